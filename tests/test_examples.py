"""Every file in examples/ runs, for a few steps, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SAYS = {  # what a run ends with
    "accelerate_loop": r"training accuracy of the last \d+ images",
    "continual_learning": r"first task (\d\.\d+), after the second \1; second task",
    "ddp": "2 processes, .* the same weights everywhere",
    "fsdp2": "2 processes, loss .*, penalty",
    "gan_discriminator": "layer 2: singular values",
    "lightning_loop": "test accuracy",
    "lipschitz_certificate": r"certified within 0\.2",
    "plain_loop": "test accuracy",
}
NEEDS = {"accelerate_loop": "accelerate", "lightning_loop": "lightning"}
PROCESSES = {"ddp": 2, "fsdp2": 2}


def test_every_example_is_run() -> None:
    assert sorted(SAYS) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", sorted(SAYS))
def test_example(name: str) -> None:
    pytest.importorskip("sklearn")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    if name in NEEDS:
        probe = [sys.executable, "-c", f"import {NEEDS[name]}"]
        imported = subprocess.run(probe, capture_output=True, text=True, timeout=120, env=environment)
        if imported.returncode:
            pytest.skip(f"{NEEDS[name]} cannot be imported: {imported.stderr.strip().splitlines()[-1]}")
    command = [sys.executable]
    if name in PROCESSES:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES[name])]
    command += [str(EXAMPLES / f"{name}.py"), "--steps", "4"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(SAYS[name], ended.stdout), ended.stdout


@pytest.mark.parametrize("name", sorted(SAYS))
def test_an_example_says_what_it_shows_and_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    docstring = text.split('"""')[1]
    assert text.startswith('"""') and f"examples/{name}.py" in docstring and len(docstring.splitlines()) > 3
