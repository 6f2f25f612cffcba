"""The penalty and its gradient: per layer shape and for whole networks, against the official arithmetic.

The bound is one matrix product of the FLOPs that are needed: on a GPU those of the overlapping taps in bfloat16, where
the gram counts three times (bf16x3); on a CPU those of the closed form, per layer the form with fewer, in float32.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isonet_fast import OrthoConv2d, OrthoRegularizer, reference
from isonet_fast.models.official import official_penalty
from isonet_fast.penalty_arguments import checked_layer
from isonet_fast.regularizer import official_filter

from . import providers
from .clocks import Graphed
from .harness import Contender, Session, Workload, parser

NETWORKS = ("isonet34", "isonet50", "isonet18", "isonet101")  # in the order of interest
SLOW = ("isonet18", "kernel5", "risonet50", "isonet34")  # with targets on a CPU, where the official form takes seconds
TOLERANCE = {"cpu": 1e-4, "cuda": 5e-2}  # cuDNN multiplies the official code's float32 in TF32


def penalised(model: nn.Module) -> list[nn.Conv2d]:
    """The convolutions that the official code penalises."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and official_filter(name, module) and getattr(module, "penalty", True)
    ]


def flops(convs: Sequence[nn.Conv2d], gradient: bool, cuda: bool) -> float:
    """On a GPU the grams of half the units count three times (for unit 0 half: the tiles on or above the diagonal).
    The gradient takes two products per gram, one at unit 0. On a CPU it is what the closed form multiplies."""
    total = 0.0
    for conv in convs:
        geometry = checked_layer(conv.weight, conv.stride, conv.dilation, conv.groups, "isonet")
        if not cuda:
            total += 2 * geometry.multiplications(geometry.form, gradient)
            continue
        form = geometry.triton_form
        for unit in geometry.units(form):
            pairs = geometry.overlap(unit) if form == "overlap" else 2 if any(unit) else 1
            gram = 2 * geometry.groups * geometry.rows**2 * geometry.columns * pairs
            total += 3 * gram * (1.0 if any(unit) else 0.5)
            total += gradient * gram * (2 if any(unit) else 1)
    return total


@torch.backends.cudnn.flags(enabled=True, benchmark=False)  # it would try every algorithm for each layer's float64
def truth(convs: Sequence[nn.Conv2d]) -> tuple[float, list[Tensor]]:
    """The penalty and its gradients in float64, one layer at a time."""
    total = 0.0
    grads: list[Tensor] = []
    for conv in convs:
        weight = conv.weight.detach().double().requires_grad_()
        loss = reference.orthogonality_loss(weight, stride=conv.stride)
        grads.extend(torch.autograd.grad(loss, weight))
        total += loss.item()
    return total, grads


def deviation(loss: Tensor, grads: Sequence[Tensor] | None, expected: tuple[float, list[Tensor]]) -> float:
    """The larger of the loss's relative error and the worst layer's relative gradient error (2-norms)."""
    errors = [abs(loss.item() - expected[0]) / expected[0]]
    for grad, reference_grad in zip(grads or [], expected[1], strict=False):
        errors.append(((grad.double() - reference_grad).norm() / reference_grad.norm()).item())
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def by_autograd(penalty: Callable[[], Tensor], weights: list[Tensor], gradient: bool) -> Callable[[], tuple]:
    """(loss, gradients) of a penalty that autograd differentiates."""

    def call() -> tuple[Tensor, Sequence[Tensor] | None]:
        if not gradient:
            with torch.no_grad():
                return penalty(), None
        loss = penalty()
        return loss.detach(), torch.autograd.grad(loss, weights)

    return call


def ours(model: nn.Module, weights: list[Tensor], gradient: bool) -> Callable[[], tuple]:
    """Our penalty as a training step uses it: its gradient is added to that of the loss."""
    regularizer = OrthoRegularizer(model, 1.0)
    if not gradient:
        return by_autograd(regularizer, weights, False)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)

    def call() -> tuple[Tensor, list[Tensor]]:
        return regularizer.accumulate_grad_(), [w.grad for w in weights if w.grad is not None]

    return call


class PenaltyBenchmark:
    """One network (or layer): its providers, each checked against the same truth."""

    def __init__(
        self,
        session: Session,
        name: str,
        model: nn.Module,
        repo: providers.OfficialRepo | None = None,
        op: str = "orthogonality",
        layout: str = "channels_last",
    ) -> None:
        """layout: of the weights on a GPU, as training has them; on a CPU they are contiguous."""
        self.session, self.name, self.op = session, name, op
        self.layout = layout if session.cuda else ""
        memory_format = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        self.model = providers.perturb(model).to(session.device, memory_format=memory_format)
        self.convs = penalised(self.model)
        self.weights: list[Tensor] = [conv.weight for conv in self.convs]
        self.truth = truth(self.convs)
        self.repo = repo
        self.repo_model = repo.network(name, self.model) if repo and "isonet" in name else None

    def calls(self, gradient: bool, compile: bool) -> dict[str, Callable[[], tuple]]:
        found = {
            "official": by_autograd(functools.partial(official_penalty, self.model), self.weights, gradient),
            "isonet_fast": ours(self.model, self.weights, gradient),
        }
        if self.repo and self.repo_model:
            weights: list[Tensor] = [conv.weight for conv in penalised(self.repo_model)]
            penalty = functools.partial(self.repo.penalty, self.repo_model)
            found["official-repo"] = by_autograd(penalty, weights, gradient)
        if compile:
            modes = {"compile": None, "compile (max-autotune)": "max-autotune-no-cudagraphs"}
            for name, mode in list(modes.items())[: 1 if self.session.quick else 2]:
                function = providers.compiled(providers.official_penalty_on_device, self.session.dry, mode)
                found[name] = by_autograd(functools.partial(function, self.model), self.weights, gradient)
        return found

    def compare(self, mode: str, compile: bool = False) -> None:
        """`graph`: replayed where it can be captured; the official form copies from the host, which can't be."""
        gradient, graph = "gradient" in mode, mode.endswith("graph")
        work = flops(self.convs, gradient, self.session.cuda)

        def build() -> list[Contender]:
            contenders = []
            for name, call in self.calls(gradient, compile).items():
                captured = graph and not name.startswith("official")
                made = self._contender(name, Graphed(self.session.clock, call) if captured else call, work)
                made.plain = call
                contenders.append(made)
            dtype = torch.bfloat16 if self.session.cuda else torch.float32
            bounds = [providers.matmul_bound(work, dtype, self.session.device)]
            if graph:  # reading every weight and writing it as two bfloat16 planes
                bounds.append(providers.copy_bound(8 * sum(w.numel() for w in self.weights), self.session.device))
            return [*bounds, *contenders]

        what = f"{self.name} {mode}"
        if not self.session.late(what):
            workload = Workload(self.op, mode, self.name, "float32", self.layout)
            tolerance = TOLERANCE[self.session.device.type]
            self.session.compare(workload, self.session.attempt(what, build), tolerance, "matmul", "cold")
        self.session.clock.release()

    def _contender(self, name: str, call: Callable[[], tuple], work: float) -> Contender:
        def check() -> float:
            if isinstance(call, Graphed):
                call()  # the first call captures, and what warms it up adds to the gradients too
            for weight in self.weights:
                if weight.grad is not None:
                    weight.grad.zero_()
            return deviation(*call(), self.truth)

        return Contender(name, call, check, flops=work)


def layer_shapes(networks: Sequence[str]) -> dict[str, nn.Module]:
    """Every distinct penalised convolution of these networks, by a name such as 3x3 64->128 s2."""
    found: dict[str, nn.Module] = {}
    with torch.device("meta"):
        convs = [conv for name in networks for conv in penalised(providers.build(name))]
    for conv in convs:
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        name = f"{kernel}x{kernel} {conv.in_channels}->{conv.out_channels} s{stride}"
        if name not in found:
            own = OrthoConv2d(conv.in_channels, conv.out_channels, kernel, stride, kernel // 2, bias=False)
            found[name] = nn.Sequential(own)
    return found


def main(arguments: Sequence[str] | None = None) -> Session:
    args = parser(__doc__, official_repo=True).parse_args(arguments)
    session = Session("orthogonality", args)
    repo = providers.OfficialRepo(args.official_repo) if args.official_repo else None
    networks = ["cifar8"] if session.dry else ["cifar32", *NETWORKS]
    if session.quick and not session.dry:
        networks = list(NETWORKS) if session.cuda else ["cifar32"]
    benchmarks = []
    first = "loss+gradient graph" if session.cuda else "loss+gradient"  # the mode that has a target
    for name in networks:
        for benchmark in session.case(name, functools.partial(network, session, name, repo)):
            benchmarks.append(benchmark)
            benchmark.compare(first)
    if session.cuda or not session.quick:
        fewest = sorted(benchmarks, key=lambda benchmark: len(benchmark.weights))  # they compile fastest
        for benchmark in fewest[: 2 if session.quick else None]:
            if not session.late(f"{benchmark.name} compiled", needed=30.0 if session.cuda else 0.0):
                benchmark.compare(first, compile=True)
    others = ["loss+gradient", "loss"] if session.cuda else ["loss"]
    for mode, benchmark in itertools.product(others, benchmarks):
        benchmark.compare(mode)
    if session.cuda:
        for benchmark in session.case("NCHW", functools.partial(network, session, networks[0], layout="nchw")):
            benchmark.compare(first)
    run_layers(session, first)
    if session.quick and not session.cuda:
        for name in SLOW:
            for benchmark in session.case(name, functools.partial(network, session, name, repo), needed=30.0):
                benchmark.compare(first)
    return session


def network(
    session: Session, name: str, repo: providers.OfficialRepo | None = None, **options: Any
) -> PenaltyBenchmark:
    return PenaltyBenchmark(session, name, providers.build(name), repo, **options)


def run_layers(session: Session, mode: str) -> None:
    few = ["cifar8"] if session.dry else ["cifar32"] if session.quick and not session.cuda else NETWORKS
    for name, module in layer_shapes(few).items():
        for benchmark in session.case(name, functools.partial(PenaltyBenchmark, session, name, module)):
            benchmark.compare(mode)


if __name__ == "__main__":
    sys.exit(main().finish())
