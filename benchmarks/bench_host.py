"""What the penalty of a whole network costs the host: the time until a planned call returns.

On a GPU the device's work is not awaited. Without a GPU, Triton's real launch code runs on tensors of the CPU against a
stub driver that launches nothing (tools/null_driver.py), so the times contain everything except the driver's own time.
malloc then keeps freed memory, as PyTorch's caching allocator does on a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import sys
from collections.abc import Sequence

import torch

from isonet_fast import OrthoRegularizer
from isonet_fast.layers import CONVOLUTIONS, official_filter
from isonet_fast.ops import orthogonality

from . import ROOT, providers
from .harness import Contender, Session, Workload, parser

NETWORKS = ("isonet101", "isonet50", "isonet34", "isonet18")


def without_gpu() -> None:
    """Have the Triton kernels serve tensors of the CPU, with a stub driver that launches nothing."""
    sys.path.insert(0, str(ROOT / "tools"))
    import null_driver

    null_driver.activate()
    _keep_memory()
    torch.set_num_threads(1)
    orthogonality.serves = lambda weights: True


def _keep_memory() -> None:
    """Have malloc map nothing and return nothing: large buffers would cost a system call each."""
    trim_threshold, mmap_max = -1, -4  # of mallopt(3)
    library = ctypes.CDLL(None)
    library.mallopt(mmap_max, 0)
    library.mallopt(trim_threshold, 2**31 - 1)


def compare(session: Session, network: str) -> None:
    model = providers.build(network).to(session.device)
    regularizer = OrthoRegularizer(model, 1e-4)
    parameters = list(model.parameters())
    places = itertools.cycle([[torch.zeros_like(p) for p in parameters] for _ in range(2)])

    def move() -> None:
        for parameter, gradient in zip(parameters, next(places), strict=True):
            parameter.grad = gradient

    def accumulate_moved() -> None:
        move()
        regularizer.accumulate_grad_()

    move()
    total = regularizer()
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)]
    weights = [module.weight for name, module in layers if official_filter(name, module)]

    def gradient() -> None:
        torch.autograd.grad(total, weights, retain_graph=True)

    calls = {
        "accumulate_grad_": regularizer.accumulate_grad_,
        "accumulate_grad_ moved": accumulate_moved,
        "loss": regularizer,
        "gradient": gradient,
    }
    for mode, call in calls.items():
        workload = Workload("orthogonality_host", mode, f"{network}, {len(weights)} layers", "float32")
        session.compare(workload, [Contender("isonet_fast", call)], how="host")
    session.clock.release()


def main(arguments: Sequence[str] | None = None) -> Session:
    session = Session("host", parser(__doc__).parse_args(arguments))
    if session.device.type == "cpu":
        if importlib.util.find_spec("triton") is None:
            session.say("left out: Triton is not installed")
            return session
        without_gpu()
    session.clock.sample_ms *= 10  # what disturbs a shared machine for a tenth of a second must not be the median
    for network in ["cifar8"] if session.dry else NETWORKS[: 1 if session.quick else None]:
        if not session.late(network):
            compare(session, network)
    return session


if __name__ == "__main__":
    sys.exit(main().finish())
