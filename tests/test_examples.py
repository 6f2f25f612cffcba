"""Every file in examples/ runs, for a few steps, in a process of its own or on two ranks."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from pathlib import Path

import pytest

from isonet_fast.import_torchvision import import_torchvision

from .processes import run_ranks, run_script

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
RANKS = {"ddp": 2, "fsdp2": 2}


def beside_a_cpu_torch() -> None:
    """Lightning imports a torchvision that is installed, and the one of another torch build does not load without."""
    with contextlib.suppress(ModuleNotFoundError):
        import_torchvision()


BEFORE = {"lightning_loop": beside_a_cpu_torch}


def test_every_example_is_run() -> None:
    assert sorted(SAYS) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", sorted(SAYS))
def test_an_example_runs_and_says_what_it_should(name: str, tmp_path: Path) -> None:
    for package in ["sklearn", *NEEDS.get(name, [])]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    script, arguments = EXAMPLES / f"{name}.py", SHORT.get(name, ["--steps", "4"])
    if name in RANKS:
        ended = run_ranks(RANKS[name], script, arguments, tmp_path)
    else:
        ended = run_script(script, arguments, tmp_path, BEFORE.get(name))
    assert ended.returncode == 0, ended
    assert re.search(SAYS[name], ended.stdout), ended.stdout


@pytest.mark.parametrize("name", sorted(SAYS))
def test_an_example_says_what_it_shows_and_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    docstring = text.split('"""')[1]
    assert text.startswith('"""') and f"examples/{name}.py" in docstring and len(docstring.splitlines()) > 3
