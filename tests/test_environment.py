"""info(): which implementation serves each op on this machine, and why."""

import subprocess
import sys

import pytest
import torch

import isonet_fast
from isonet_fast import environment
from isonet_fast.ops import library

OPS = ("srelu, residual_srelu", "orthogonality_loss")


def rows(text):
    return dict(line.split("  ", 1) for line in text.splitlines())


def devices():
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def test_prints_a_row_for_every_op_on_every_device(capsys):
    isonet_fast.info()
    printed = {name.strip(): value.strip() for name, value in rows(capsys.readouterr().out).items()}
    assert printed == environment.describe()
    for device in devices():
        for op in OPS:
            served = printed[f"{op} on {device}"]
            assert served and "FAILS" not in served
    assert printed["isonet_fast"] == isonet_fast.__version__ and printed["torch"] == torch.__version__


def test_says_why_the_compiled_kernels_are_not_there(monkeypatch):
    monkeypatch.setattr(library, "why_not_compiled", "built without the compiled kernels")
    served = environment.describe()
    assert served["srelu, residual_srelu on cpu"] == "PyTorch: built without the compiled kernels"
    assert served["orthogonality_loss on cpu"] == "closed form"


def test_says_that_the_compiled_kernels_serve():
    if library.why_not_compiled:
        pytest.skip(library.why_not_compiled)
    served = environment.describe()
    assert served["srelu, residual_srelu on cpu"] == "C++ kernels (csrc)"
    assert served["orthogonality_loss on cpu"].startswith(
        "C++ kernel (csrc) for small float32 layers, otherwise closed"
    )


@pytest.mark.parametrize("op, launch", [(OPS[0], "srelu"), (OPS[1], "orthogonality_loss")])
def test_a_launch_that_fails_is_reported_with_its_reason(monkeypatch, capsys, op, launch):
    """A real launch is made, and whatever it throws belongs in the report, not in a traceback."""

    def fails(*args, **kwargs):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(environment, launch, fails)
    isonet_fast.info()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{op} on cpu")]
    assert "FAILS" in line and "RuntimeError: no kernel image is available" in line


@pytest.mark.parametrize(
    "op, launch, wrong",
    [(OPS[0], "srelu", lambda x, bias: x), (OPS[1], "orthogonality_loss", lambda weight: weight.sum())],
)
def test_a_wrong_result_is_reported(monkeypatch, op, launch, wrong):
    monkeypatch.setattr(environment, launch, wrong)
    assert environment.describe()[f"{op} on cpu"].startswith("FAILS: ")


def test_the_command_prints_it():
    result = subprocess.run(
        [sys.executable, "-m", "isonet_fast", "info"], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    printed = {name.strip() for name in rows(result.stdout)}
    assert {f"{op} on {device}" for op in OPS for device in devices()} <= printed
