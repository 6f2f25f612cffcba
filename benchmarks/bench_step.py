"""Whole training steps: official, compiled, ours, ours without its penalty, bare, and ResNet with BatchNorm.

The penalty's share is what its absence saves: everything that it adds is in it. `--profile` says where a step's time
goes.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from isonet_fast.models.official import bare, official, official_penalty

from . import providers
from .breakdown import profile
from .harness import Contender, Session, Workload, dtype_name, parser
from .step import CHECKED, TOLERANCE, Step, deviation, flops, torchvision_resnet, truth

SECONDS = {"cpu": 15.0, "cuda": 6.0}  # for the samples of a group


class TrainingCase(NamedTuple):
    network: str
    batch: int
    size: int

    @property
    def depth(self) -> int:
        return int(self.network.rpartition("isonet")[2] or 0) if "isonet" in self.network else 0

    @property
    def resnet(self) -> Callable[[], nn.Module] | None:
        """What makes the network with BatchNorm that it is compared with, if any."""
        return torchvision_resnet(self.depth) if self.depth else None

    def __str__(self) -> str:
        return f"{self.network} batch {self.batch} {self.size}x{self.size}"


def cases(session: Session) -> tuple[list[TrainingCase], list[TrainingCase]]:
    """The cases of interest, which are also compiled, and the rest."""
    if session.dry:
        return [TrainingCase("cifar8", 2, 8)], []
    if session.cuda:
        of_interest = [TrainingCase(network, 256, 224) for network in ("isonet50", "risonet50")]
        rest = [TrainingCase(f"isonet{depth}", 128, 224) for depth in (34, 18, 101)]
        return of_interest, [*rest, TrainingCase("cifar32", 128, 32)]
    if session.quick:
        return [TrainingCase("cifar32", 32, 32)], []
    networks = ("isonet18", "isonet34", "isonet50", "isonet101", "risonet50")
    return [TrainingCase("cifar32", 32, 32)], [TrainingCase(network, 4, 96) for network in networks]


class StepBenchmark:
    """The providers of one case, on one batch of images."""

    def __init__(self, session: Session, case: TrainingCase, repo: providers.OfficialRepo | None) -> None:
        self.session, self.case = session, case
        self.half = session.cuda
        self.layout = torch.channels_last if session.cuda else torch.contiguous_format
        self.model = providers.perturb(providers.build(case.network)).to(session.device, memory_format=self.layout)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(case.batch, 3, case.size, case.size, generator=generator)
        self.x = images.to(session.device, memory_format=self.layout)
        self.y = torch.randint(10, (case.batch,), generator=generator).to(session.device)
        self.truth = truth(self.model, self.x[:CHECKED], self.y[:CHECKED])
        self.flops = flops(self.model, self.x)
        self.repo = repo if "isonet" in case.network else None
        layout = "channels_last" if self.layout == torch.channels_last else "nchw"
        self.dtype = torch.bfloat16 if self.half else torch.float32
        self.workload = Workload("step", "training", str(case), dtype_name(self.dtype), layout)
        self.timed: set[str] = set()

    def step(self, provider: str) -> Step | None:
        """None where this machine lacks the provider."""
        model, half = self.model, self.half
        if provider == "official":
            return Step(official(model), half, official_penalty)
        if provider == "compile":
            compiled = functools.partial(providers.compiled, dry=self.session.dry)
            return Step(official(model), half, providers.official_penalty_on_device, wrap=compiled)
        if provider == "official-repo":
            if self.repo is None:
                return None
            network = self.repo.network(self.case.network, model).to(memory_format=self.layout)
            return Step(network, half, self.repo.penalty)
        if provider.startswith("resnet"):
            make = self.case.resnet
            if make is None:
                if self.case.depth:
                    self.session.say(f"left out: {provider} beside {self.case}, as torchvision is not installed")
                return None
            resnet = make().to(self.session.device, memory_format=self.layout)
            return Step(resnet, half, wrap=self._compile_if("compile" in provider))
        if provider == "bare":
            return Step(bare(model), half)
        return Step(self._copy(), half, regularize=provider == "isonet_fast")

    def _copy(self) -> nn.Module:
        copied = providers.build(self.case.network).to(self.session.device, memory_format=self.layout)
        copied.load_state_dict(self.model.state_dict())
        return copied

    def _compile_if(self, compile: bool) -> Callable:
        return functools.partial(providers.compiled, dry=self.session.dry) if compile else lambda function: function

    def contender(self, provider: str) -> list[Contender]:
        step = self.step(provider)
        if step is None:
            return []
        check: Callable[[], float] | None = None
        if provider in ("official", "official-repo", "isonet_fast"):

            def check() -> float:
                return step.error(self.x[:CHECKED], self.y[:CHECKED], self.truth)

        elif provider == "compile":  # on the whole batch: it is compiled only for that shape

            def check() -> float:
                plain = Step(official(self.model), self.half, official_penalty).measured(self.x, self.y)
                return deviation(step.measured(self.x, self.y), plain)

        run = functools.partial(step, self.x, self.y)
        work = 0.0 if provider.startswith("resnet") else self.flops
        return [Contender(provider, run, check, flops=work, resident=step.resident)]

    def compare(self, *chosen: str) -> None:
        session = self.session
        if session.late(f"{self.case}: {', '.join(chosen)}"):
            return
        limit = session.matmul_tflops(self.dtype)
        contenders = [c for name in chosen for c in session.attempt(name, functools.partial(self.contender, name))]
        seconds = SECONDS[session.device.type]
        self.timed |= session.compare(self.workload, contenders, TOLERANCE[self.half], limit, seconds=seconds).keys()
        session.clock.release()

    def profile(self, provider: str) -> None:
        if provider == "isonet_fast":
            self.session.demand("step")
        step = self.step(provider)
        assert step is not None
        compared = provider == "isonet_fast" and {"official", "isonet_fast", "bare"} <= self.timed
        profile(self.session, self.workload, provider, step, self.x, self.y, compared)


EAGER = ("official", "official-repo", "isonet_fast", "isonet_fast without penalty", "bare", "resnet")
COMPILED = ("resnet, compile", "compile")


def main(arguments: Sequence[str] | None = None) -> Session:
    options = parser(__doc__, official_repo=True)
    options.add_argument("--profile", action="store_true", help="where the time of a step goes, and a trace in runs/")
    args = options.parse_args(arguments)
    session = Session("step", args)
    repo = providers.OfficialRepo(args.official_repo) if args.official_repo else None
    main_cases, rest = cases(session)
    for case in main_cases:
        for benchmark in session.case(str(case), functools.partial(StepBenchmark, session, case, repo)):
            benchmark.compare(*EAGER)
            if args.profile:
                for provider in ("official", "isonet_fast"):
                    session.attempt(f"profile, {provider}", lambda b=benchmark, p=provider: [b.profile(p)])
    if session.cuda or not session.quick:
        for case, provider in itertools.product(main_cases, COMPILED):  # one at a time: each may be the last
            if provider.startswith("resnet") and case.resnet is None:
                continue
            build = functools.partial(StepBenchmark, session, case, None)
            for benchmark in session.case(f"{case} {provider}", build, needed=45.0 if session.cuda else 0.0):
                benchmark.compare("isonet_fast", provider)
    for case in rest:
        build = functools.partial(StepBenchmark, session, case, repo)
        for benchmark in session.case(str(case), build, needed=10.0 if session.cuda else 0.0):
            benchmark.compare(*EAGER)
    return session


if __name__ == "__main__":
    sys.exit(main().finish())
