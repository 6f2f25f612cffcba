"""How CMake builds the CUDA kernels: for which GPUs, what is exported, and the warnings for this machine's."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
RELEASE = "75-real;80;86-real;89-real;90-real;100-real;120-real"
sys.path.insert(0, str(ROOT / "tools"))

import lower_cuda
import wheel_architectures

PATH = os.pathsep.join([os.environ["PATH"], os.path.dirname(sys.executable)])
CMAKE = shutil.which("cmake", path=PATH)
pytestmark = pytest.mark.skipif(CMAKE is None, reason="cmake is not installed")


def pretend(folder: pathlib.Path, capability: str, driver: str) -> dict[str, str]:
    """The environment of a machine with this GPU; with none if the capability is empty."""
    tool = folder / "nvidia-smi"
    answers = f'case "$1" in *compute_cap) echo {capability};; *driver_version) echo {driver};; esac'
    tool.write_text(f"#!/bin/sh\n{answers if capability else 'echo no devices were found; exit 6'}\n")
    tool.chmod(0o755)
    return {**os.environ, "PATH": os.pathsep.join([str(folder), PATH])}


@pytest.mark.parametrize(
    ("capability", "asked", "chosen"),
    [
        ("9.0", "", "90-real"),
        ("", "", RELEASE),
        ("9.0", "release", RELEASE),  # what `make wheel` asks for: not the GPU of the machine that builds it
        ("9.0", "80-real;90a", "80-real;90a"),
    ],
)
def test_kernels_are_built_for_the_gpu_here_unless_others_are_asked_for(
    tmp_path: pathlib.Path, capability: str, asked: str, chosen: str
) -> None:
    assert configured(tmp_path, capability, "580.65.06", asked)[0] == chosen


@pytest.mark.parametrize(
    ("capability", "driver", "asked", "toolkit", "warning"),
    [
        ("9.0", "580.65.06", "", "13.0.88", None),
        ("9.0", "570.124.06", "", "13.0.88", "need driver 580 or newer, this machine has 570.124.06"),
        ("9.0", "570.124.06", "", "12.8.93", None),
        (
            "9.0",
            "580.65.06",
            "80-real",
            "13.0.88",
            "no kernel is built for this machine's GPU of compute capability 9.0",
        ),
        ("9.0", "580.65.06", "80", "13.0.88", None),  # its PTX
        ("8.6", "580.65.06", "80-real", "13.0.88", None),
        ("12.1", "580.65.06", "120-real", "13.0.88", None),
        ("7.0", "580.65.06", "release", "13.0.88", "compute capability 7.0"),
        ("", "", "", "13.0.88", None),
    ],
)
def test_a_gpu_that_cannot_run_the_kernels_is_named(
    tmp_path: pathlib.Path, capability: str, driver: str, asked: str, toolkit: str, warning: str | None
) -> None:
    _, printed = configured(tmp_path, capability, driver, asked, toolkit)
    printed = " ".join(printed.split())
    assert warning in printed if warning else "Warning" not in printed, printed


def configured(
    folder: pathlib.Path, capability: str, driver: str, asked: str, toolkit: str = "13.0"
) -> tuple[str, str]:
    """What architectures.cmake chooses on a machine with this GPU, and what it prints."""
    script = folder / "script.cmake"
    script.write_text(
        f'set(CMAKE_CUDA_ARCHITECTURES "{asked}")\ninclude({ROOT}/csrc/architectures.cmake)\nchoose_architectures()\n'
        f'warn_where_kernels_cannot_run({toolkit})\nmessage(STATUS "chosen=${{CMAKE_CUDA_ARCHITECTURES}}")\n'
    )
    environment = pretend(folder, capability, driver)
    command = [str(CMAKE), "-P", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip().removeprefix("-- chosen="), done.stderr


@pytest.mark.skipif(lower_cuda.nvcc() is None, reason="nvcc was not found")
def test_kernels_are_hidden_and_compiled_for_every_architecture(tmp_path: pathlib.Path) -> None:
    """The options of nvcc for a release wheel, built on a machine with a GPU."""
    options = {
        "ISONET_FAST_CUDA": "ON",
        "CMAKE_CUDA_COMPILER": lower_cuda.nvcc(),
        "CMAKE_CUDA_ARCHITECTURES": "release",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "Python_EXECUTABLE": sys.executable,
    }
    command = [
        str(CMAKE),
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path),
        *(f"-D{name}={value}" for name, value in options.items()),
    ]
    environment = pretend(tmp_path, "9.0", "580.65.06")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    kernels = [each["command"] for each in commands if each["file"].endswith(".cu")]
    assert len(kernels) == len(lower_cuda.SOURCES) >= 2
    for line in kernels:
        assert "-fvisibility=hidden" in line
        assert all(f"sm_{number}" in line for number in (75, 80, 86, 89, 90, 100, 120)) and "compute_80" in line


@pytest.mark.skipif(lower_cuda.why_not() is not None, reason=str(lower_cuda.why_not()))
def test_the_architectures_of_a_wheel_are_read_back(tmp_path: pathlib.Path) -> None:
    assert wheel_architectures.release() == wheel_architectures.listed(RELEASE.split(";"))
    assert {f"sm_{arch}" for arch in lower_cuda.ARCHITECTURES} == wheel_architectures.release()[0]
    source = tmp_path / "kernel.cu"
    source.write_text("__global__ void kernel(float* x) { *x = 0; }\n")
    library = tmp_path / "_C.so"
    code = [f"-gencode=arch=compute_{a},code={c}" for a, c in ((75, "sm_75"), (80, "sm_80"), (80, "compute_80"))]
    subprocess.run([lower_cuda.nvcc(), *code, "-shared", "-Xcompiler=-fPIC", "-o", library, source], check=True)
    assert wheel_architectures.compiled(library) == ({"sm_75", "sm_80"}, {"sm_80"})
    wheel = tmp_path / "isonet_fast-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(library, wheel_architectures.LIBRARY)
    problem = wheel_architectures.check(wheel)
    assert problem is not None and problem.endswith("lacks sm_100, sm_120, sm_86, sm_89, sm_90")
