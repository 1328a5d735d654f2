"""Builds the optional C++ extension ``wplfast._C``; everything else about the package is in pyproject.toml.

Environment:
    WPLFAST_NO_CPP: ``1`` leaves the extension out; the plain-PyTorch backend then serves CPU tensors.
    WPLFAST_CUDA_ARCHS: targets such as ``80;90;100``; a wheel then also holds Triton kernels precompiled for them, and
        its version says so: ``0.2.0+sm80.sm90.sm100``. Needs torch and triton: ``pip wheel --no-build-isolation .``
    CXX, CXXFLAGS: compiler and extra flags, as usual.
    WPLFAST_JOBS: how many sources are compiled at a time; as many as there are processors without it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
# GCC 12 warns inside its own intrinsics (https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593), and about the calling
# convention of vectors that only inlined functions pass.
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized"]
NO_COMPILER = """
The C++ extension of wplfast could not be built (see the compiler's message above).
Either install a C++17 compiler (GCC 9 or newer, or clang; e.g. `apt install g++`), or install without the extension:
    WPLFAST_NO_CPP=1 pip install .
wplfast then runs on plain PyTorch on CPUs, which is slower; GPUs are not affected.
"""
NO_PACKS = """
The Triton kernels could not be precompiled (see the message above). WPLFAST_CUDA_ARCHS needs torch, numpy and triton in
the environment that builds, for which build isolation must be off:
    WPLFAST_CUDA_ARCHS="80;90" pip wheel --no-deps --no-build-isolation .
Without WPLFAST_CUDA_ARCHS the kernels are compiled at run time.
"""


def cuda_archs() -> list[int]:
    """Return the targets that packs are made for."""
    named = os.environ.get("WPLFAST_CUDA_ARCHS", "")
    archs = [arch for arch in re.split(r"[;,\s]+", named) if arch]
    if not all(re.fullmatch(r"\d{2,3}", arch) for arch in archs):
        raise SystemExit(f"WPLFAST_CUDA_ARCHS must be targets such as '80;90;100', got {named!r}")
    return sorted({int(arch) for arch in archs})


def version() -> str:
    """Return the package's version, with the packs that a wheel holds as its local part."""
    plain = re.search(r'^__version__ = "(.+)"', Path("wplfast/__init__.py").read_text(), re.MULTILINE)
    if plain is None:
        raise SystemExit("wplfast/__init__.py has no __version__")
    packs = ".".join(f"sm{arch}" for arch in cuda_archs())
    return f"{plain[1]}+{packs}" if packs else plain[1]


class BuildExtension(build_ext):
    """Adds OpenMP where the compiler has it, says what to do where nothing compiles, and makes packs of kernels."""

    def run(self) -> None:
        """Build the extension, and with it what it launches."""
        super().run()
        root = Path.cwd() if self.inplace else Path(self.build_lib).resolve()
        folder = root / "wplfast/backends/triton/packs"
        if cuda_archs() or not self.inplace:  # those of an earlier build must not get into this wheel
            for stale in folder.glob("sm_*.zip"):
                stale.unlink()
        if cuda_archs():
            self._precompile(cuda_archs(), root, folder)

    def _precompile(self, archs: list[int], root: Path, folder: Path) -> None:
        """Make packs for targets, by the package under ``root`` and into ``folder``."""
        builder = [sys.executable, "-m", "wplfast.backends.triton.packs.precompile", "--out", str(folder)]
        paths = [str(root), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment["WPLFAST_KERNELS"] = "jit"
        environment.pop("TRITON_INTERPRET", None)
        command = [*builder, "--archs", *map(str, archs)]
        if subprocess.run(command, env=environment, cwd=root).returncode != 0:
            raise SystemExit(NO_PACKS)

    def build_extension(self, ext: Extension) -> None:
        """Build one extension, or stop with advice."""
        if self._compiles("int main() { return 0; }", ["-fopenmp"]):
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")
        try:
            super().build_extension(ext)
        except (CompileError, LinkError, OSError, subprocess.SubprocessError) as error:
            raise SystemExit(f"{error}\n{NO_COMPILER}") from error

    def _compiles(self, source: str, flags: list[str]) -> bool:
        """Tell whether the compiler can compile and link a program with the flags."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probe.cpp"
            path.write_text(source)
            try:
                objects = self.compiler.compile([str(path)], output_dir="/", extra_postargs=flags)
                self.compiler.link_executable(objects, str(path.with_suffix("")), extra_postargs=flags)
            except (CompileError, LinkError, OSError):
                return False
        return True


def extensions() -> list[Extension]:
    """Return the extension, or nothing where it is switched off."""
    if os.environ.get("WPLFAST_NO_CPP") == "1":
        if cuda_archs():
            raise SystemExit("WPLFAST_CUDA_ARCHS needs the extension, which launches the kernels: unset WPLFAST_NO_CPP")
        return []
    from pybind11 import get_include
    from pybind11.setup_helpers import ParallelCompile

    ParallelCompile("WPLFAST_JOBS").install()
    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    depends = sorted(str(path) for pattern in ("*.h", "*.inl") for path in Path("csrc").glob(pattern))
    return [
        Extension(
            "wplfast._C",
            sources,
            depends=depends,
            include_dirs=[get_include()],
            extra_compile_args=list(FLAGS),
            libraries=["dl"] if sys.platform == "linux" else [],  # glibc before 2.34 has dlopen in a library of its own
            language="c++",
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension}, version=version())
