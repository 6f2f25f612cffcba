"""Where the Triton kernels run: on a GPU, or in Triton's interpreter if TRITON_INTERPRET=1 was set before they were
imported (test_triton_interpreter.py starts such a process)."""

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import triton_interpreter

    triton_interpreter.repair()
    torch.set_num_threads(1)


@pytest.fixture
def device(request):
    if INTERPRETED:
        return torch.device("cpu")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if request.config.getoption("--device") == "cpu":
        pytest.skip("no GPU; test_triton_interpreter.py runs these in Triton's interpreter")
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(params=["tma", "pointer"])
def variant(request, device, monkeypatch):
    """The set of tiles that serves precision=None."""
    from isonet_fast import problem
    from isonet_fast.kernels import orthogonality

    if request.param == "tma" and device.type == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("this GPU has no tensor memory accelerator")
    monkeypatch.setattr(orthogonality, "variant", lambda device, precision: precision or request.param)
    problem.read.cache_clear()  # problems with tables of the other variant
    yield request.param
    problem.read.cache_clear()
