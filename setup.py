"""Builds isonet_fast/_C.so with CMake when it can; otherwise the install is pure Python and says so.

The metadata is in pyproject.toml. torch is no build requirement, since an isolated build would download
gigabytes; the kernels are built when torch is already there:  pip install --no-build-isolation .

ISONET_FAST_KERNELS  0: no kernels; 1: fail if they cannot be built
ISONET_FAST_CUDA     0: CPU kernels only; 1: fail without the CUDA kernels; unset: CUDA if nvcc is found
ISONET_FAST_CUDA_ARCHS  CMake's list, such as "90-real;100-real"
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = pathlib.Path(__file__).resolve().parent
TORCH_FLOOR = (2, 11)


def demanded() -> bool:
    return "1" in (os.environ.get("ISONET_FAST_KERNELS"), os.environ.get("ISONET_FAST_CUDA"))


def executable(name: str) -> str | None:
    """On the PATH, or beside the Python that runs (pip installs cmake and ninja there)."""
    return shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))


def obstacle() -> str | None:
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


class BuildKernels(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # the stable ABI: no Python version in the name

    def build_extension(self, ext: Extension) -> None:
        target = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)
        reason = obstacle()
        if reason is None:
            cuda = {"0": "OFF", "1": "ON"}.get(os.environ.get("ISONET_FAST_CUDA", ""), "AUTO")
            for attempt in [cuda] if cuda != "AUTO" else ["AUTO", "OFF"]:  # an nvcc that does not work is no nvcc
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

    def cmake(self, output: pathlib.Path, cuda: str) -> None:
        cmake, ninja = executable("cmake"), executable("ninja")
        torch = importlib.util.find_spec("torch")
        assert cmake is not None and torch is not None and torch.origin is not None
        options = {
            "ISONET_FAST_CUDA": cuda,
            "ISONET_FAST_OUTPUT": output,
            "ISONET_FAST_TORCH": pathlib.Path(torch.origin).parent,
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


setup(
    ext_modules=[Extension("isonet_fast._C", sources=[], optional=not demanded())],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
