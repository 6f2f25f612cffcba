"""Builds isonet_fast/_C.so with CMake when it can; otherwise the install is pure Python and says so.

The metadata is in pyproject.toml, except for what old versions of setuptools cannot read there. torch is no build
requirement, because an isolated build would download gigabytes. The kernels are built when torch is already there:

    pip install --no-build-isolation .

ISONET_FAST_KERNELS  0: no kernels; 1: fail if they cannot be built
ISONET_FAST_CUDA     0: CPU kernels only; 1: fail without the CUDA kernels; unset: CUDA kernels if torch is a CUDA build
                     and nvcc is found
ISONET_FAST_CUDA_ARCHS  CMake's list, such as "90-real;100-real"; "release": all that a release wheel is made for
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:
        sys.exit(
            f"isonet_fast: setuptools {setuptools.__version__} cannot build without the package wheel; "
            "first run: pip install --upgrade 'setuptools<82' wheel cmake ninja"
        )

ROOT = pathlib.Path(__file__).resolve().parent
PACKAGE = ROOT / "isonet_fast"
HOME = "https://github.com/isonet-fast/isonet-fast"
TORCH_FLOOR = (2, 11)
WITHOUT = "_C.txt"  # in the place of _C.so: why there are no kernels, for `isonet-fast info`


def demanded() -> bool:
    return "1" in (os.environ.get("ISONET_FAST_KERNELS"), os.environ.get("ISONET_FAST_CUDA"))


def executable(name: str) -> str | None:
    """The program on the PATH, or beside the Python that runs (pip installs cmake and ninja there)."""
    return shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))


def why_not() -> str | None:
    """Why the kernels cannot be built here, or None."""
    if os.environ.get("ISONET_FAST_KERNELS") == "0":
        return "ISONET_FAST_KERNELS=0"
    if not sys.platform.startswith("linux"):
        return f"they are built on Linux only, this is {sys.platform}"
    if importlib.util.find_spec("torch") is None:
        return "torch is not visible to this build"
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < TORCH_FLOOR:
        return f"torch {version} is older than {'.'.join(map(str, TORCH_FLOOR))}"
    if executable("cmake") is None:
        return "cmake was not found"
    if (os.environ.get("CXX") or executable("c++") or executable("g++") or executable("clang++")) is None:
        return "no C++ compiler was found"
    return None


def torch_folder() -> pathlib.Path:
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    return pathlib.Path(torch.origin).parent


def cuda() -> str:
    """ON, OFF or AUTO. A CPU build of torch has no use for kernels that take minutes to compile."""
    asked = {"0": "OFF", "1": "ON"}.get(os.environ.get("ISONET_FAST_CUDA", ""))
    return asked or ("AUTO" if runpy.run_path(str(torch_folder() / "version.py")).get("cuda") else "OFF")


class BuildPython(build_py):
    def run(self) -> None:
        # A module that was deleted from the sources would come back from an earlier build.
        shutil.rmtree(pathlib.Path(self.build_lib) / PACKAGE.name, ignore_errors=True)
        super().run()


class BuildKernels(build_ext):
    def run(self) -> None:
        self.into_sources = bool(self.inplace)  # an editable install; setuptools resets `inplace` while it builds
        if self.into_sources:  # nothing of an earlier build may serve
            for name in ("_C.so", WITHOUT):
                (PACKAGE / name).unlink(missing_ok=True)
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # the stable ABI: no Python version in the name

    def build_extension(self, ext: Extension) -> None:
        target = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)
        reason = why_not()
        if reason is None:
            for attempt in ["AUTO", "OFF"] if cuda() == "AUTO" else [cuda()]:  # an nvcc that does not work is no nvcc
                try:
                    self.cmake(target.parent, attempt)
                    return
                except subprocess.CalledProcessError as error:
                    reason = f"the build failed (its output is above): {error.cmd[0]} returned {error.returncode}"
        if demanded():
            raise RuntimeError(f"isonet_fast: the compiled kernels were demanded, but {reason}")
        needs = f"with torch {'.'.join(map(str, TORCH_FLOOR))} or newer, cmake and a C++ compiler, build them with"
        command = "pip install --no-build-isolation ."
        print(f"isonet_fast: installing without compiled kernels ({reason}); {needs}: {command}", file=sys.stderr)
        ((PACKAGE if self.into_sources else target.parent) / WITHOUT).write_text(f"{reason}\n", encoding="utf-8")

    def cmake(self, output: pathlib.Path, with_cuda: str) -> None:
        cmake, ninja = executable("cmake"), executable("ninja")
        assert cmake is not None
        options = {
            "ISONET_FAST_CUDA": with_cuda,
            "ISONET_FAST_OUTPUT": output,
            "ISONET_FAST_TORCH": torch_folder(),
            "CMAKE_BUILD_TYPE": "Release",
        }
        if os.environ.get("ISONET_FAST_CUDA_ARCHS"):
            options["CMAKE_CUDA_ARCHITECTURES"] = os.environ["ISONET_FAST_CUDA_ARCHS"]
        if ninja is not None:
            options["CMAKE_MAKE_PROGRAM"] = ninja
        build = pathlib.Path(self.build_temp).resolve() / "native"
        # A directory configured for another generator, environment or place cannot be reused.
        shutil.rmtree(build, ignore_errors=True)
        generator = ["-G", "Ninja"] if ninja is not None else []
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run([cmake, *generator, "-S", str(ROOT), "-B", str(build), *definitions], check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)


class Wheel(bdist_wheel):
    """py3-none-<platform> with the library inside, py3-none-any without."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        library = pathlib.Path(self.get_finalized_command("build").build_lib) / "isonet_fast" / "_C.so"
        self.root_is_pure = not library.exists()
        return "py3", "none", "any" if self.root_is_pure else platform


def readme() -> str:
    """README.md with links that also work on the page of a package index."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{HOME}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\1{HOME}/blob/main/", text)


def licence() -> dict[str, str]:
    """An SPDX expression. Setuptools before 77, which an offline GPU machine may have, knows only the older form."""
    modern = int(setuptools.__version__.partition(".")[0]) >= 77
    return {"license_expression" if modern else "license": "MIT"}


setup(
    ext_modules=[Extension("isonet_fast._C", sources=[], optional=not demanded())],
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels, "bdist_wheel": Wheel},
    long_description=readme(),
    long_description_content_type="text/markdown",
    **licence(),
)
