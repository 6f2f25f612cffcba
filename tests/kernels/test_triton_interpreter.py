"""Runs the kernels' tests in Triton's interpreter: a process of its own, as TRITON_INTERPRET counts when they are
decorated and would reach every other test."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_kernels_in_the_interpreter():
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    run = subprocess.run(
        [*command, "-rs", str(HERE / "test_triton_orthogonality.py"), str(HERE / "test_triton_cuda.py")],
        env=environment, capture_output=True, text=True, cwd=HERE.parents[1], check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    skipped = [line for line in run.stdout.splitlines() if line.startswith("SKIPPED")]
    allowed = ("the default of the interpreter", "no GPU")
    assert all(line.endswith(allowed) for line in skipped) and " passed" in run.stdout, run.stdout
