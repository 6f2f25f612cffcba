"""How cost grows with depth, width and batch of a network, and with width and number of layers of the penalty.

One number varies at a time; the case names it (`depth 32`), so that the figures read the x axis from the rows.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import torch
from torch import nn

from isonet_fast import OrthoConv2d
from isonet_fast.models.official import bare, official, official_penalty

from . import bench_orthogonality, providers
from .harness import Contender, Session, Workload, dtype_name, parser
from .step import CHECKED, TOLERANCE, Step, truth

DEPTH, WIDTH, BATCH, SIZE = 20, 1, 32, 32  # of isonet_cifar where they do not vary; width in multiples of 16
CHANNELS, LAYERS = 64, 4  # of the stacks of 3x3 convolutions
VARY = {  # values on the CPU and on a GPU, of which `--quick` takes the first three
    "depth": ([8, 14, 20, 32, 56], [8, 20, 32, 56, 110]),
    "width": ([1, 2], [1, 2, 4, 8, 16]),
    "batch": ([8, 16, 32, 64, 128], [32, 128, 256, 512, 1024]),
    "channels": ([16, 32, 64, 128, 256], [64, 128, 256, 512, 1024]),
    "layers": ([1, 4, 16], [1, 4, 16, 64, 256]),
}


def values(session: Session, name: str) -> list[int]:
    if session.dry:
        return {"depth": [8], "width": [2], "batch": [2]}.get(name, [16 if name == "channels" else 2])
    return VARY[name][session.cuda][: 3 if session.quick else None]


def step(session: Session, name: str, value: int) -> None:
    """A training step of isonet_cifar."""
    setting = {"depth": DEPTH, "width": WIDTH, "batch": BATCH}
    if session.dry:
        setting |= {"depth": 8, "batch": 2}
    setting |= {name: value}
    layout = torch.channels_last if session.cuda else torch.contiguous_format
    model = providers.perturb(providers.build(f"cifar{setting['depth']}x{setting['width']}"))
    model = model.to(session.device, memory_format=layout)
    size = 8 if session.dry else SIZE
    x = torch.randn(setting["batch"], 3, size, size).to(session.device, memory_format=layout)
    y = torch.randint(10, (setting["batch"],)).to(session.device)
    steps = {
        "official": Step(official(model), session.cuda, official_penalty),
        "bare": Step(bare(model), session.cuda),
        "isonet_fast": Step(model, session.cuda, regularize=True),
    }
    few = x[:CHECKED], y[:CHECKED]
    expected = truth(model, *few)
    contenders = []
    for provider, made in steps.items():
        check = None if provider == "bare" else functools.partial(made.error, *few, expected)
        contenders.append(Contender(provider, functools.partial(made, x, y), check, resident=made.resident))
    dtype = dtype_name(torch.bfloat16 if session.cuda else torch.float32)
    workload = Workload("step, scaling", "training", f"{name} {value}", dtype)
    session.compare(workload, contenders, TOLERANCE[session.cuda])


def penalty(session: Session, name: str, value: int) -> None:
    """Penalty and gradient of a stack of equal 3x3 convolutions."""
    setting = {"channels": 16 if session.dry else CHANNELS, "layers": LAYERS} | {name: value}
    channels = setting["channels"]
    convs = (OrthoConv2d(channels, channels, 3, padding=1, bias=False) for _ in range(setting["layers"]))
    model, what = nn.Sequential(*convs), f"{name} {value}"
    benchmark = bench_orthogonality.PenaltyBenchmark(session, what, model, op="orthogonality, scaling")
    benchmark.compare("loss+gradient")


def main(arguments: Sequence[str] | None = None) -> Session:
    session = Session("scaling", parser(__doc__).parse_args(arguments))
    for name in VARY:
        for value in values(session, name):
            if not session.late(f"{name} {value}"):
                (penalty if name in ("channels", "layers") else step)(session, name, value)
    return session


if __name__ == "__main__":
    sys.exit(main().finish())
