"""The wheel as its users get it: what is in it, what it links against, and that it works away from the sources.

``WPLFAST_WHEEL`` names a wheel to look at, as ``make wheel-test`` does. Otherwise one is built here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from packaging.metadata import Metadata
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
BUILDER = ROOT / ".ci" / "wheel"
PACKS = "wplfast/backends/triton/packs/"
LINUX = sys.platform == "linux"
#: What every Linux has, and libgomp.so.1, which torch brings. Neither torch nor libcuda: one wheel serves with any.
LIBRARIES = {
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libgomp.so.1",
    "libc.so.6",
    "libm.so.6",
    "libpthread.so.0",
    "libdl.so.2",
}
OPENMP = r"\S*/lib[gi]?omp[-.]\S*"

pytestmark = pytest.mark.slow


def environment(**extra: str) -> dict[str, str]:
    """Return the environment without what would choose a backend, a search path or another kind of wheel."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("WPLFAST_", "PYTHONPATH"))}
    return {**mine, **extra}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with a source distribution and a wheel built from it."""
    if given := os.environ.get("WPLFAST_WHEEL"):
        return Path(given).parent
    if not BUILDER.exists():
        pytest.skip("no sources beside the tests")
    for tool in ("build", "pybind11", *(["auditwheel"] if LINUX else [])):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("dist")
    # Optimised least, in a third of the time: what is looked at here does not depend on it. `make wheel-test` looks at
    # the wheel that users get.
    compiler = tmp_path_factory.mktemp("compiler") / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    settings = {"PYTHON": sys.executable, "CXX": str(compiler)} if LINUX else {"PYTHON": sys.executable}
    done = subprocess.run([BUILDER, folder], env=environment(**settings), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    if given := os.environ.get("WPLFAST_WHEEL"):
        return Path(given)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    """Return what is in the wheel, without the folder that describes it."""
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if not (".dist-info/" in name or name.endswith("/"))]


@pytest.fixture(scope="module")
def about(wheel: Path) -> dict[str, str]:
    """Return the files that describe the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        listed = [name for name in archive.namelist() if ".dist-info/" in name and not name.endswith("/")]
        return {name.partition("/")[2]: archive.read(name).decode() for name in listed}


@pytest.fixture(scope="module")
def extension(wheel: Path, names: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel's shared object, unpacked."""
    found = [name for name in names if ".so" in PurePosixPath(name).suffixes]
    if not found and wheel.name.endswith("-none-any.whl"):
        pytest.skip("a wheel without the extension")
    assert found == ["wplfast/_C" + sysconfig.get_config_var("EXT_SUFFIX")]
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(found[0], tmp_path_factory.mktemp("extension")))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel, and nothing else, installed."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def run_with(installed: Path, code: str, folder: Path, **extra: str) -> str:
    """Run code away from the sources, with the installed wheel, and return what it prints."""
    script = folder / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script],
        env=environment(PYTHONPATH=str(installed), **extra),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def readelf(flag: str, path: Path) -> str:
    """Return one of readelf's tables."""
    if not LINUX or shutil.which("readelf") is None:
        pytest.skip("readelf is needed, on Linux")
    return subprocess.run(["readelf", flag, "--wide", path], capture_output=True, text=True, check=True).stdout


def sources(*patterns: str) -> set[str]:
    """Return files of the checkout, relative to its root."""
    return {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}


def test_source_distribution_holds_what_is_built_from(built):
    found = list(built.glob("*.tar.gz"))
    if not found and "WPLFAST_WHEEL" in os.environ:
        pytest.skip("no source distribution beside the wheel")
    (path,) = found
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert held >= sources("csrc/*", "wplfast/**/*.py", "wplfast/py.typed", "tests/**/*.py", "tests/native/*", "*.md")
    assert held >= sources("examples/*.py")
    assert held >= sources(
        "Makefile", "MANIFEST.in", "setup.py", "pyproject.toml", "LICENSE", ".ci/*", "benchmarks/*.py"
    )
    assert not [name for name in held if re.search(r"\.(so|o|pyc|whl)$|__pycache__|/packs/sm_", name)]


def test_wheel_holds_the_package_alone(names, about):
    if not BUILDER.exists():
        pytest.skip("no sources beside the tests")
    package = sources("wplfast/**/*.py", "wplfast/py.typed")
    others = {name for name in names if name not in package}
    assert package <= set(names)
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"wplfast/_C\.[\w.-]+\.so|" + PACKS + r"sm_\d+\.zip", name) for name in others), others
    assert set(about) == {"METADATA", "WHEEL", "RECORD", "top_level.txt", "entry_points.txt", "licenses/LICENSE"}


def test_version_names_the_precompiled_kernels(wheel, names):
    local = parse_wheel_filename(wheel.name)[1].local
    packs = {
        PurePosixPath(name).stem.replace("_", "") for name in names if name.startswith(PACKS) and name.endswith(".zip")
    }
    assert packs == set(local.split(".") if local else ())


def test_metadata(wheel, about):
    metadata = Metadata.from_email(about["METADATA"], validate=True)
    assert metadata.name == "wplfast"
    assert metadata.version == parse_wheel_filename(wheel.name)[1]
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.license_files == ["LICENSE"]
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description is not None
    assert metadata.description.lstrip().startswith("# wplfast")
    required = {requirement.name for requirement in metadata.requires_dist or () if requirement.marker is None}
    assert required == {"torch", "numpy", "safetensors", "tqdm"}
    assert "Apache License" in about["licenses/LICENSE"]


def test_tags_say_what_it_runs_on(wheel, about, names):
    tags = parse_wheel_filename(wheel.name)[3]
    assert {str(tag) for tag in tags} == set(re.findall(r"^Tag: (.+)$", about["WHEEL"], re.MULTILINE))
    compiled = any(name.startswith("wplfast/_C.") for name in names)
    assert ("Root-Is-Purelib: true" in about["WHEEL"]) == (not compiled)
    for tag in tags:
        if not compiled:
            assert tag.platform == "any"
        elif LINUX:
            assert tag.interpreter == f"cp{sys.version_info.major}{sys.version_info.minor}"
            assert tag.platform.startswith("manylinux")


def test_extension_links_against_little(extension):
    dynamic = readelf("--dynamic", extension)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert "libc.so.6" in needed
    assert not {name for name in needed if not name.startswith("ld-linux")} - LIBRARIES
    assert "PATH)" not in dynamic  # neither RPATH nor RUNPATH: a place on the machine that built it
    assert not re.search(r"\.(debug_\w+|symtab)\b", readelf("--sections", extension))


def test_serves_away_from_the_sources(wheel, installed, tmp_path, names):
    compiled = any(name.startswith("wplfast/_C.") for name in names)
    code = """
import torch, wplfast
layer = torch.nn.Linear(3, 2)
fisher = wplfast.fisher_diagonal(layer, [(torch.randn(8, 3), torch.randint(2, (8,)))], wplfast.losses.cross_entropy)
wpl = wplfast.WeightPlasticityLoss(layer, alpha=2.0)
wpl.consolidate(fisher)
with torch.no_grad():
    layer.bias += 1.0
assert torch.isclose(wpl(), fisher["bias"].sum()), (wpl(), fisher["bias"])
print(wplfast.__file__, wplfast.__version__, wplfast.backends.serving("cpu"), sep="\\n")
try:
    print(open("/proc/self/maps").read())
except OSError:
    pass  # not Linux
"""
    file, version, backend, *maps = run_with(installed, code, tmp_path).split("\n")
    assert Path(file) == installed / "wplfast" / "__init__.py"
    assert version == parse_wheel_filename(wheel.name)[1].public
    assert backend == ("cpp" if compiled else "reference")
    runtimes = set(re.findall(OPENMP, "\n".join(maps)))
    assert len(runtimes) == (1 if LINUX else 0), runtimes


@pytest.mark.skipif("WPLFAST_WHEEL" not in os.environ, reason="test_docs.py runs the same text")
def test_long_description_runs(installed, about, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", about["METADATA"], re.DOTALL)
    assert len(blocks) > 1
    run_with(installed, "\n".join(blocks), tmp_path)


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_one_openmp_runtime_in_any_order(installed, extension, tmp_path):
    """An extension that is loaded before torch, which importing wplfast never does, brings no second runtime."""
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("wplfast._C", {str(extension)!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
import torch
print(open("/proc/self/maps").read())
"""
    runtimes = set(re.findall(OPENMP, run_with(installed, code, tmp_path)))
    assert len(runtimes) == 1, runtimes
