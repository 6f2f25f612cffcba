"""Small layers on the CPU: the compiled kernel over overlapping taps (offsets) and over frequencies.

Ten layers of one size, penalty and gradient together, on one thread and on all. `geometry.SMALL_FACTOR` follows from
where the two forms meet.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from isonet_fast import reference
from isonet_fast.ops import library, small_layers
from isonet_fast.penalty_arguments import checked_layer

from .harness import Contender, Session, Workload, parser

COUNT = 10  # layers
TOLERANCE = 1e-4
LAYERS = [  # channels, kernel, stride
    *[(channels, (3, 3), 1) for channels in (9, 10, 12, 14, 16, 32, 64, 128)],
    *[(channels, (5, 5), 1) for channels in (16, 32, 64, 128)],
    *[(32, (2, 2), 1), (64, (4, 4), 2), (32, (3,), 1), (64, (3,), 1), (16, (5,), 1)],
]


def compare(session: Session, channels: int, kernel: tuple[int, ...], stride: int) -> None:
    weights = [torch.randn(channels, channels, *kernel) / channels**0.5 for _ in range(COUNT)]
    grads = [torch.empty_like(weight) for weight in weights]
    layer = checked_layer(weights[0], stride, 1, 1, "isonet")
    exact = weights[0].double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.orthogonality_loss(exact, stride=stride), exact)

    def contender(form: str) -> Contender:
        plan, waves, _ = small_layers.kernel_arguments([layer] * COUNT, [(form, layer.units(form))] * COUNT)

        def run() -> None:
            library.ops.orthogonality_small_(weights, grads, plan, waves, [1.0] * COUNT, False)

        def check() -> float:
            run()
            return ((grads[0] - expected).norm() / expected.norm()).item()

        return Contender(form, run, check, flops=2 * COUNT * layer.multiplications(form, True))

    case = f"{channels} channels, {'x'.join(map(str, kernel))}" + (f", stride {stride}" if stride > 1 else "")
    threads = torch.get_num_threads()
    for mode, count in (("one thread", 1), ("all threads", threads)):
        torch.set_num_threads(count)
        workload = Workload("orthogonality_small", mode, case, "float32")
        session.compare(workload, [contender(form) for form in ("overlap", "frequency")], TOLERANCE)
    torch.set_num_threads(threads)


def main(arguments: Sequence[str] | None = None) -> Session:
    session = Session("small", parser(__doc__).parse_args(arguments))
    if not library.compiled_for("cpu"):
        session.say("left out: the compiled kernels are not built")
        return session
    for layer in LAYERS[:1] if session.dry else LAYERS:
        compare(session, *layer)
    return session


if __name__ == "__main__":
    sys.exit(main().finish())
