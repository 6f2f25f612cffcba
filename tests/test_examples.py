"""Every file in examples/ runs, for a few steps, in a process of its own."""

from __future__ import annotations

import importlib.util
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
    "timm_loop": "epoch 0: loss .*, top-1",
}
NEEDS = {"accelerate_loop": ["accelerate"], "lightning_loop": ["lightning"], "timm_loop": ["timm", "PIL"]}
SHORT = {"timm_loop": ["--epochs", "1", "--batch-size", "400"]}
PROCESSES = {"ddp": 2, "fsdp2": 2}
# Lightning imports a torchvision that is installed, and the one of another torch build does not load without this.
BESIDE_A_CPU_TORCH = """
import contextlib, runpy, sys
from isonet_fast.import_torchvision import import_torchvision
with contextlib.suppress(ModuleNotFoundError):
    import_torchvision()
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_every_example_is_run() -> None:
    assert sorted(SAYS) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", sorted(SAYS))
def test_an_example_runs_and_says_what_it_should(name: str) -> None:
    for package in ["sklearn", *NEEDS.get(name, [])]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    script = [str(EXAMPLES / f"{name}.py"), *SHORT.get(name, ["--steps", "4"])]
    command = [sys.executable, *script]
    if name in PROCESSES:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES[name])]
        command = [sys.executable, *launcher, *script]
    if name == "lightning_loop":
        command = [sys.executable, "-c", BESIDE_A_CPU_TORCH, *script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(SAYS[name], ended.stdout), ended.stdout


@pytest.mark.parametrize("name", sorted(SAYS))
def test_an_example_says_what_it_shows_and_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    docstring = text.split('"""')[1]
    assert text.startswith('"""') and f"examples/{name}.py" in docstring and len(docstring.splitlines()) > 3
