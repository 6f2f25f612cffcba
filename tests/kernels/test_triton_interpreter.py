"""Runs the kernels' tests in Triton's interpreter: a process of its own, as TRITON_INTERPRET counts when they are
decorated and would reach every other test."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)


def run(*arguments):
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    command += ["-rs", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    allowed = ("the default of the interpreter", "no GPU")
    assert all(line.endswith(allowed) for line in skipped) and " passed" in done.stdout, done.stdout


def test_kernels_in_the_interpreter():
    run(HERE / "test_triton_orthogonality.py", HERE / "test_triton_cuda.py")


def test_ops_in_the_interpreter():
    """The tests of the ops, with the kernels behind them as on a GPU."""
    # One layer at a time is test_triton_orthogonality's part; the kernels choose a layer's form themselves.
    chosen = "not test_against_the_reference and not frequency"
    run("-p", "serve_interpreted", "-k", chosen, HERE.parent / "ops" / "test_orthogonality.py")
