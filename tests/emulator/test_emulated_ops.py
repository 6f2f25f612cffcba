"""The tests of the ops, with the CUDA kernels behind them: csrc/bindings.cpp as it is, launches run by the emulator."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from emulator_build import HERE, ROOT, build, obstacle

TESTS = ("csrc/test_kernels.py", "ops/test_srelu.py", "ops/test_residual_srelu.py", "nn/test_srelu.py")
SKIPS = ("no GPU", "graphs and streams are CUDA's")  # what only a GPU can show


def test_ops(tmp_path: pathlib.Path) -> None:
    if reason := obstacle():
        pytest.skip(reason)
    # A directory, and so a lock, of its own: the other tests of the emulator need not wait for this build.
    library = build(ROOT / "build" / "emulated_ops", "-DOPS=ON") / "emulated_C.so"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "isonet_fast", tmp_path / "isonet_fast", ignore=ignored)
    shutil.copy(library, tmp_path / "isonet_fast" / "_C.so")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / "emulated_ops.py"), "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "-rs", "--tb=short", f"--rootdir={ROOT}"]
    command += [str(ROOT / "tests" / test) for test in TESTS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all(line.endswith(SKIPS) for line in skipped), skipped
    launches = re.search(r"(\d+) launches", done.stdout)
    assert launches is not None and int(launches[1]) > 1000, done.stdout[-2000:]
