"""Would the emulator's tests notice? Each classic CUDA bug, planted in a copy of the real sources, must be caught.

One build holds all three, each behind a switch that an environment variable throws; with none thrown it must pass.
"""

from __future__ import annotations

import pathlib

import pytest
from emulator_build import ROOT, build, run_checks, why_not

# name: (file, text in the source, its replacement)
BUGS = {
    "missing_barrier": (
        "elementwise.cuh",
        "sums[y * width + x * V + v] = r.grad_bias[v];\n    }\n    __syncthreads();",
        'sums[y * width + x * V + v] = r.grad_bias[v];\n    }\n    if (!planted("missing_barrier")) __syncthreads();',
    ),
    "off_by_one": (
        "elementwise.cuh",
        "if (row < stop) in[u][k] =",
        'if (row < stop + planted("off_by_one")) in[u][k] =',
    ),
    "missing_wait": (
        "elementwise.cuh",
        "ISONET_FAST_AWAIT_GRID();\n  if",
        'if (!planted("missing_wait")) ISONET_FAST_AWAIT_GRID();\n  if',
    ),
    "divergent_barrier": (
        "elementwise.cuh",
        "if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;\n  __syncthreads();",
        "if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;\n"
        '  if (!planted("divergent_barrier") || threadIdx.x < 32) __syncthreads();',
    ),
}
SWITCH = """
#include <cstdlib>
#include <cstring>
inline bool planted(const char* bug) { return std::strcmp(std::getenv("EMULATOR_PLANTED"), bug) == 0; }
"""


def patch(sources: dict[str, str], file: str, old: str, new: str) -> None:
    assert sources[file].count(old) == 1, f"{file} no longer contains, once: {old}"
    sources[file] = sources[file].replace(old, new)


def write(sources: dict[str, str], directory: pathlib.Path) -> None:
    """What has not changed keeps its time, and is not compiled again."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        if path.name not in sources:
            path.unlink()
    for name, text in sources.items():
        if not (directory / name).exists() or (directory / name).read_text() != text:
            (directory / name).write_text(text)


@pytest.fixture(scope="session")
def mutants() -> pathlib.Path:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    directory = ROOT / "build" / "emulator"
    sources = {path.name: path.read_text() for path in (ROOT / "csrc").iterdir()}
    for file, old, new in BUGS.values():
        patch(sources, file, old, new)
    patch(sources, "partition.h", "#pragma once\n", "#pragma once\n" + SWITCH)
    for dtype in ("float64", "float16", "bfloat16"):  # only float32: it compiles four times faster
        element = {"float64": "double", "float16": "__half", "bfloat16": "__nv_bfloat16"}[dtype]
        line = f"case DType::{dtype}: return launch_typed<{element}, Formula>(call, workspace, stream);"
        patch(sources, "launch.cuh", line, f"case DType::{dtype}: break;")
    write(sources, directory / "mutants")
    options = f"-DMUTANTS={directory / 'mutants'}"
    return build(directory, options, targets=("emulator_mutants",)) / "emulator_mutants.so"


def run(module: pathlib.Path, planted: str) -> tuple[int, str]:
    done = run_checks(module, "--dtype", "float32", "--extents", "0", "4", "8", "12", planted=planted)
    return done.returncode, done.stdout + done.stderr


def test_with_nothing_planted_the_checks_pass(mutants: pathlib.Path) -> None:
    code, output = run(mutants, "nothing")
    assert code == 0 and "passed" in output, output[-4000:]


def test_a_missing_barrier_is_caught(mutants: pathlib.Path) -> None:
    code, output = run(mutants, "missing_barrier")
    assert code != 0 and "grad_bias" in output and "AssertionError" in output, output[-4000:]


def test_an_access_off_by_one_is_caught(mutants: pathlib.Path) -> None:
    code, output = run(mutants, "off_by_one")
    assert code != 0 and "AddressSanitizer: heap-buffer-overflow" in output, output[-4000:]


def test_a_missing_wait_is_caught(mutants: pathlib.Path) -> None:
    code, output = run(mutants, "missing_wait")
    assert code != 0 and "before the kernel that writes them is awaited" in output, output[-4000:]


def test_a_divergent_barrier_is_caught(mutants: pathlib.Path) -> None:
    code, output = run(mutants, "divergent_barrier")
    assert code != 0 and "deadlock" in output, output[-4000:]
