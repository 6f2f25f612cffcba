"""One suite for every device: `pytest --device cuda` runs, on that device, the tests that take `device`."""

import hashlib
import os
import pathlib
import shutil
import signal

import pytest

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # set before torch is imported, and inherited by the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

# Inductor's cache knows ops by their schemas: what it kept for other sources of this package is not for these.
SOURCES = sorted(pathlib.Path(__file__).parents[1].glob("isonet_fast/**/*.py"))
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
os.environ.setdefault("TORCH_COMPILE_CACHE_KEY_TAG", DIGEST)

# Compilers that know C++20 know these instructions: Inductor need not compile something for each set to find out. Nor
# need it start processes to compile in, which import torch each: a test compiles one thing at a time.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# An op that returns its input, or two views of one buffer, fails here as it will in a later PyTorch.
os.environ.setdefault("TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING", "1")

# A shell ignores Ctrl-C in what a script starts in the background, and nohup a hang-up. Child processes inherit what is
# ignored, but no handlers, and tests send them these signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the tests that take the `device` fixture run")


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(params=["overlap", "frequency"])
def form(request, monkeypatch):
    """Every layer in this form, whatever it costs."""
    from isonet_fast.geometry import Layer
    from isonet_fast.problem import read

    monkeypatch.setattr(Layer, "form", property(lambda layer: request.param))
    read.cache_clear()
    yield request.param
    read.cache_clear()


def pytest_collection_modifyitems(config, items):
    """Away from the CPU only what concerns the device runs: the rest has been tested already."""
    if config.getoption("--device") == "cpu":
        return
    chosen = [item for item in items if "device" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


@pytest.fixture(autouse=True)
def seeded():
    # Without a GPU torch.manual_seed would format the stack, for what may ask later where a seed came from.
    (torch if torch.cuda.is_available() else torch.default_generator).manual_seed(0)


@pytest.fixture(scope="session")
def compiler():
    """For tests whose subject compiles C or C++ while it runs: Inductor, Triton's launchers, nvcc's host part."""
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")))):
        pytest.skip("no C++ compiler on the PATH")
