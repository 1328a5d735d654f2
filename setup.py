"""Builds the optional C++ extension ``wplfast._C``; everything else about the package is in pyproject.toml.

Environment:
    WPLFAST_NO_CPP: ``1`` leaves the extension out; the plain-PyTorch backend then serves CPU tensors.
    CXX, CXXFLAGS: compiler and extra flags, as usual.
    WPLFAST_JOBS: how many sources are compiled at a time; as many as there are processors without it.
"""

from __future__ import annotations

import os
import subprocess
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


class BuildExtension(build_ext):
    """Adds OpenMP where the compiler has it, and says what to do where nothing compiles."""

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
            extra_link_args=[],
            language="c++",
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
