"""SReLU and the residual join against the official arithmetic, torch.compile of it and a copy of as many bytes.

Every distinct activation shape of ISONet-50 and R-ISONet-50. Inputs lie on a grid on which every sum is exact in every
dtype, so that outputs and masks must agree with float64 to the last bit, ties included.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isonet_fast import models, reference
from isonet_fast.functional import residual_srelu, srelu
from isonet_fast.nn import ResidualSReLU, SReLU

from . import providers
from .clocks import Graphed
from .harness import Contender, Session, Workload, dtype_name, error, parser

Shape = tuple[int, ...]
LARGE = 256 << 20  # bytes of a tensor that no cache holds a part of worth having; below, a CUDA graph hides the host
TOLERANCE = 1e-3  # of float32 sums over millions; outputs and masks are exact
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Op(NamedTuple):
    forward: int  # tensors read or written; all but the last are inputs
    backward: int
    network: str  # whose activations are taken: what this layer sees
    layer: type
    official: Callable
    ours: Callable


OPS = {
    "srelu": Op(2, 3, "isonet50", SReLU, providers.official_srelu, srelu),
    "residual_srelu": Op(3, 3, "risonet50", ResidualSReLU, providers.official_join, residual_srelu),
    "residual_srelu, scale": Op(3, 5, "risonet50", ResidualSReLU, providers.official_join, residual_srelu),
}


class ActivationCase(NamedTuple):
    op: str
    shape: Shape
    dtype: torch.dtype
    layout: str

    @property
    def head(self) -> bool:
        """The shape that targets and torch.compile are measured on: R-ISONet-50 joins it and SReLU sees it most."""
        return self.shape[1:] == (256, 56, 56)

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        return f"{self.op} {self.size} {dtype_name(self.dtype)} {self.layout}"


@functools.cache
def activation_shapes(network: str, kind: type, batch: int) -> list[Shape]:
    """What the SReLUs (or joins) of a network see, as the official stem has it: before pooling. Largest first."""
    with torch.device("meta"):
        model = getattr(models, network)()
        image = torch.empty(batch, 3, 224, 224)
    shapes = {(batch, 64, 112, 112)} if kind is SReLU else set()
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_pre_hook(lambda module, args: shapes.add(tuple(args[0].shape)))
    model(image)
    return sorted(shapes, key=lambda shape: (-math.prod(shape), shape))


def cases(session: Session) -> list[ActivationCase]:
    """All cases. With `--quick` on a GPU every shape in bfloat16 channels_last, one of them in all formats. On a CPU a
    few, and two sizes in both layouts, of which one stays in a cache."""
    if session.dry:
        return [ActivationCase(op, (2, 5, 3, 4), torch.bfloat16, "channels_last") for op in OPS]
    batches = (256, 32) if session.cuda else (8, 2)
    found = []
    for batch, op, dtype, layout in itertools.product(batches, OPS, (torch.bfloat16, torch.float32), LAYOUTS):
        shapes = activation_shapes(OPS[op].network, OPS[op].layer, batch)
        found += [ActivationCase(op, shape, dtype, layout) for shape in shapes]
    if session.quick:
        few = [case for case in found if case.shape[0] == batches[0]]
        found = [case for case in few if _shown(session, case)]
        if not session.cuda:
            sizes = (32, 64, 56, 56), (32, 256, 14, 14)
            formats = itertools.product(("srelu", "residual_srelu"), sizes, (torch.float32,), LAYOUTS)
            found += [ActivationCase(*one) for one in formats]
    return sorted(found, key=lambda case: not case.head)


def usual(session: Session, case: ActivationCase) -> bool:
    """Whether the case is in the format that training uses on this device."""
    return (case.dtype, case.layout) == ((torch.bfloat16, "channels_last") if session.cuda else (torch.float32, "nchw"))


def _shown(session: Session, case: ActivationCase) -> bool:
    if session.cuda:
        return case.head or usual(session, case)
    mixed = (case.dtype, case.layout) == (torch.bfloat16, "channels_last")
    few = case.head or (case.op == "srelu" and case.shape[1:] in ((64, 56, 56), (2048, 7, 7)))
    return (case.head and mixed and case.op == "srelu") or (usual(session, case) and few)


def grid(shape: Shape, generator: torch.Generator) -> Tensor:
    """Multiples of 1/8 in [-4, 4): they, their halves and the sums of two are exact in bfloat16."""
    return torch.randint(-32, 32, shape, generator=generator, device=generator.device).float() / 8


class Inputs:
    """One set of buffers of a case."""

    def __init__(self, case: ActivationCase, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def activation() -> Tensor:
            values = grid(case.shape, generator).to(case.dtype)
            return values.to(memory_format=LAYOUTS[case.layout]).requires_grad_()

        activations = [activation() for _ in range(OPS[case.op].forward - 1)]
        bias = (grid((case.shape[1],), generator) / 4).requires_grad_()  # a float32 master, as under autocast
        scale = [torch.full((), 0.5, device=device, requires_grad=True)] if case.op.endswith("scale") else []
        self.arguments = [*activations, bias, *scale]
        # At most two bits, so that its product with a branch, the gradient of a scale, is exact in bfloat16 too
        grad = torch.randint(-3, 4, case.shape, generator=generator, device=device).to(case.dtype)
        self.grad = grad.to(memory_format=LAYOUTS[case.layout])


def check(function: Callable, inputs: Inputs, op: str) -> float:
    """Error of output and gradients against the reference in float64."""
    results = []
    reference_op = getattr(reference, op.partition(",")[0])
    for compute, wide in ((function, False), (reference_op, True)):
        arguments = [a.detach().double() if wide else a.detach() for a in inputs.arguments]
        arguments = [a.requires_grad_() for a in arguments]
        output = compute(*arguments)
        results.append([output.detach(), *torch.autograd.grad(output, arguments, inputs.grad.to(output.dtype))])
    if op.endswith("scale") and function is not residual_srelu:  # autograd rounds that sum to the activations' dtype
        results[1][-1] = results[1][-1].to(inputs.grad.dtype).double()
    return error(*results)


def caller(function: Callable, sets: Sequence[Inputs], mode: str) -> Callable[[], None]:
    """One call per set, whose results are kept: a freed one would leave its block, in the cache, to the next.

    The leaves are its own. Autograd's node of a shared one would stay on the stream on which another provider was
    captured, as long as that provider keeps its graph, and draw that stream into the next capture.
    """
    arguments = [[argument.detach().requires_grad_() for argument in inputs.arguments] for inputs in sets]
    if mode == "forward":

        def forward() -> None:
            kept = []
            with torch.no_grad():
                for own in arguments:
                    kept.append(function(*own))

        return forward
    if mode == "forward+backward":

        def both() -> None:
            kept = []
            for own, inputs in zip(arguments, sets, strict=True):
                output = function(*own)
                kept.append((output, torch.autograd.grad(output, own, inputs.grad)))

        return both
    outputs: list[Tensor] = []

    def backward() -> None:
        if not outputs:
            outputs.extend(function(*own) for own in arguments)
        kept = []
        for output, own, inputs in zip(outputs, arguments, sets, strict=True):
            kept.append(torch.autograd.grad(output, own, inputs.grad, retain_graph=True))

    return backward


def run_case(session: Session, case: ActivationCase, compile: bool = False) -> None:
    size = math.prod(case.shape) * case.dtype.itemsize
    count = max(1, min(8, math.ceil(2 * session.clock.cache_bytes / size)))
    op = OPS[case.op]
    tensors = {"forward": op.forward, "backward": op.backward, "forward+backward": op.forward + op.backward}
    functions = {"official": op.official, "isonet_fast": op.ours}
    if compile:
        del tensors["backward"]  # compiled backwards may not keep their graph
        functions["compile"] = providers.compiled(op.official, session.dry, "max-autotune-no-cudagraphs")

    def build(mode: str) -> list[Contender]:
        sets = [Inputs(case, session.device, seed) for seed in range(count)]
        bound = providers.copy_bound(size * tensors[mode], session.device, count)
        graphed = (
            size < LARGE
        )  # a backward runs on its forward's stream: the first call, on the capturing one, makes it
        contenders = [bound]
        for name, function in functions.items():
            run = caller(function, sets, mode)
            replay = Graphed(session.clock, run) if graphed else run
            error_of = functools.partial(check, function, sets[0], case.op)
            contenders.append(Contender(name, replay, error_of, calls=count, bytes=bound.bytes, plain=run))
        return contenders

    for mode in tensors:
        what = f"{case} {mode}"
        if not session.late(what):
            workload = Workload(case.op, mode, case.size, dtype_name(case.dtype), case.layout)
            contenders = session.attempt(what, functools.partial(build, mode))
            session.compare(workload, contenders, TOLERANCE, limit="copy")
    session.clock.release()


def main(arguments: Sequence[str] | None = None) -> Session:
    session = Session("srelu", parser(__doc__).parse_args(arguments))
    found = cases(session)
    heads = [case for case in found if case.head and usual(session, case)]  # what has targets
    for case in heads:
        if not session.late(str(case)):
            run_case(session, case)
    for case in found if session.dry or not session.quick else heads:
        if not session.late(f"{case} compiled", needed=10.0):
            run_case(session, case, compile=True)
    for case in found:
        if case not in heads and not session.late(str(case)):
            run_case(session, case)
    return session


if __name__ == "__main__":
    sys.exit(main().finish())
