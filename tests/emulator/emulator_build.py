"""Builds the emulator with CMake, and runs its checks in a process of their own."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent


def cuda_include() -> pathlib.Path | None:
    """CUDA's headers: Triton's package carries them; a toolkit does too."""
    candidates = []
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(pathlib.Path(triton.origin).parent / "backends/nvidia/include")
    if os.environ.get("CUDA_HOME"):
        candidates.append(pathlib.Path(os.environ["CUDA_HOME"]) / "include")
    candidates.append(pathlib.Path("/usr/local/cuda/include"))
    return next((path for path in candidates if (path / "cuda_bf16.h").exists()), None)


def why_not() -> str | None:
    if not sys.platform.startswith("linux"):
        return "the emulator needs Linux"
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            return f"{tool} not found"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if cuda_include() is None:
        return "no CUDA headers (Triton's package or a toolkit has them)"
    return None


def build(directory: pathlib.Path, *options: str, targets: Sequence[str] = ("all",)) -> pathlib.Path:
    """Configure tests/emulator in `directory` and build these targets; one process at a time (pytest-xdist)."""
    directory.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, PATH=f"{os.environ['PATH']}:{pathlib.Path(sys.executable).parent}")
    definitions = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCUDA_INCLUDE={cuda_include()}", *options]
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=environment["PATH"]) else []
    commands = (
        ["cmake", *generator, "-S", str(HERE), "-B", str(directory), *definitions],
        ["cmake", "--build", str(directory), "--parallel", "2", "--target", *targets],
    )
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in commands:
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return directory


def run_checks(module: pathlib.Path, *options: str, planted: str = "") -> subprocess.CompletedProcess:
    """emulator_checks.py in its own process, AddressSanitizer's runtime loaded first (and what it intercepts)."""
    find = ["g++", "-print-file-name=libasan.so"], ["g++", "-print-file-name=libstdc++.so"]
    runtime = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in find]
    environment = dict(
        os.environ,
        LD_PRELOAD=" ".join(str(pathlib.Path(path).resolve()) for path in runtime),
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0",
        EMULATOR_PLANTED=planted,
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
    )
    command = [sys.executable, str(HERE / "emulator_checks.py"), str(module), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
