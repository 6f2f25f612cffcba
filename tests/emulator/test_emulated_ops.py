"""The tests of the ops, with the CUDA kernels behind them: csrc/bindings.cpp as it is, launches run by the emulator."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from emulator_build import HERE, ROOT, build, why_not

# Every op with kernels in csrc/ has tests of its name.
OPS = sorted(path.name.removesuffix("_cuda.cu") for path in (ROOT / "csrc").glob("*_cuda.cu"))
TESTS = ("csrc/test_kernels.py", *(f"ops/test_{op}.py" for op in OPS), "nn/test_srelu.py")
CPU_ALONE = "test_a_sum_that_cancels_is_rounded_once"  # sums of few terms are kept in double there, not on a GPU
SKIPS = ("no GPU", "no second GPU", "graphs and streams are CUDA's")  # what only a GPU can show


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a copy of the package whose kernels the emulator runs."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("emulated")
    # A directory, and so a lock, of its own: the other tests of the emulator need not wait for this build.
    library = build(ROOT / "build" / "emulated_ops", "-DOPS=ON") / "emulated_C.so"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "isonet_fast", folder / "isonet_fast", ignore=ignored)
    shutil.copy(library, folder / "isonet_fast" / "_C.so")
    return folder


def run(folder: pathlib.Path, script: str, *arguments: str, **more: str) -> str:
    """Run a script of this directory on that copy; what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1", **more}
    command = [sys.executable, "-W", "ignore", str(HERE / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def launches(printed: str) -> int:
    found = re.search(r"(\d+) launches", printed)
    assert found is not None, printed[-2000:]
    return int(found[1])


def test_the_tests_of_the_ops_pass_on_the_emulated_cuda_kernels(emulated: pathlib.Path) -> None:
    options = [
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-rs",
        "--tb=short",
        "-k",
        f"not {CPU_ALONE}",
        f"--rootdir={ROOT}",
    ]
    printed = run(emulated, "emulated_ops.py", *options, *(str(ROOT / "tests" / test) for test in TESTS))
    skipped = [line for line in printed.splitlines() if line.startswith("SKIPPED")]
    assert all(line.endswith(SKIPS) for line in skipped), skipped
    assert launches(printed) > 1000


def test_a_refused_launch_ends_in_pytorch(emulated: pathlib.Path) -> None:
    """A driver older than the toolkit, or a chip that the library holds no code for: tried once, then never again."""
    assert launches(run(emulated, "refused.py", EMULATOR_REFUSES="1")) == 1
