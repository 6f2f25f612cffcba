"""The demo's training step with the penalty in every step, in every fourth, in every sixteenth, and in none.

A step's time is that of 16 steps, divided by 16. `OMP_NUM_THREADS=1 python -m benchmarks.bench_interval` takes half a
minute.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from isonet_fast.models import isonet_cifar

from .harness import Contender, Session, Workload, parser
from .step import Step

DEPTH, BATCH, SIZE = 32, 32, 16  # of train/configs/isonet_digits.yaml
STEPS = 16  # of one sample: each interval divides it
PROVIDERS = {"every step": 1, "every 4th step": 4, "every 16th step": 16, "no penalty": 0}  # the interval, by provider


def compare(session: Session, depth: int) -> None:
    x = torch.randn(BATCH, 1, SIZE, SIZE, device=session.device)
    y = torch.randint(10, (BATCH,), device=session.device)

    def contender(provider: str) -> Contender:
        model = isonet_cifar(depth, in_channels=1).to(session.device)
        interval = PROVIDERS[provider]
        step = Step(model, half=False, regularize=interval > 0, interval=interval or 1)

        def run() -> None:
            for _ in range(STEPS):
                step(x, y)

        return Contender(provider, run, calls=STEPS)

    workload = Workload("interval", "training", f"cifar{depth} batch {BATCH} {SIZE}x{SIZE}", "float32", "nchw")
    session.compare(workload, list(map(contender, PROVIDERS)), seconds=30.0)


def main(arguments: Sequence[str] | None = None) -> Session:
    session = Session("interval", parser(__doc__).parse_args(arguments))
    compare(session, 8 if session.dry else DEPTH)
    return session


if __name__ == "__main__":
    sys.exit(main().finish())
