"""Write golden.json from the official code, and compare its networks with ours, element by element, on the way.

    python -m tests.parity.make_golden --official-repo PATH          (a clone of github.com/HaozhiQi/ISONet; needs yacs)

The eight networks are built by the official code from its own YAML files, and a few more with its other switches;
weights and images follow `formula.py`, in float64. Two things are changed in the official code at run time: its penalty
asks for a CUDA device and is given the CPU, and the convolution that it calls there is one matrix product (`_conv2d`),
because PyTorch's own in float64 on a CPU multiplies image by image. The eight take about an hour on two cores.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isonet_fast
from isonet_fast.models.isonet import ISONet

from . import formula, steps

GOLDEN = Path(__file__).with_name("golden.json")
CONFIGS = {
    f"{ours}{depth}": f"IN1k-{theirs}{depth}.yaml"
    for ours, theirs in (("isonet", "ISO"), ("risonet", "RISO"))
    for depth in (18, 34, 50, 101)
}
BATCH_RELU = dict(activation="relu", normalisation="batch", initialisation="kaiming", branch_scale=None)
SWITCHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, and the official configuration of that name
    "resnet18": (
        dict(depth=18, residual=True, **BATCH_RELU),
        dict(HAS_BN=True, HAS_ST=True, SReLU=False, DIRAC_INIT=False),
    ),
    "relu18": (dict(depth=18, activation="relu"), dict(SReLU=False)),
    "kaiming18": (dict(depth=18, initialisation="kaiming"), dict(DIRAC_INIT=False)),
    "batch_scale18": (  # everything at once: SReLU behind BatchNorm, a skip, a scale that starts at 1
        dict(depth=18, residual=True, normalisation="batch", branch_scale=1.0),
        dict(HAS_BN=True, HAS_ST=True, HAS_RES_MULTIPLIER=True),
    ),
}
STEPS = 3


def _conv2d(images: Tensor, weight: Tensor, padding: tuple[int, int], stride: tuple[int, int], groups: int) -> Tensor:
    """F.conv2d as one matrix product."""
    if groups != 1:
        raise ValueError("the official networks have no groups")
    columns = F.unfold(images, weight.shape[2:], padding=padding, stride=stride)
    size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(images.shape[2:], padding, weight.shape[2:], stride)]
    products = weight.flatten(1) @ columns.transpose(0, 1).flatten(1)
    return products.view(len(weight), len(images), *size).transpose(0, 1)


class Official:
    """The official modules, imported from a clone of the repository."""

    def __init__(self, repository: Path) -> None:
        sys.path.insert(0, str(repository))
        self.config = importlib.import_module("isonet.utils.config").C
        self.optim = importlib.import_module("isonet.utils.optim")
        models = importlib.import_module("isonet.models.isonet")
        models.F = types.SimpleNamespace(conv2d=_conv2d)
        self.network = models.ISONet
        self.network.ortho_conv.__defaults__ = ("cpu",)
        self.defaults = copy.deepcopy(self.config)
        self.configs = repository / "configs"

    def build(self, name: str) -> tuple[nn.Module, torch.optim.Optimizer, float]:
        """The network in float64 with its optimizer, and gamma."""
        self.config.defrost()
        self.config.merge_from_other_cfg(self.defaults)
        if name in CONFIGS:
            self.config.merge_from_file(str(self.configs / CONFIGS[name]))
        else:
            switches = dict(SWITCHED[name][1], DEPTH=SWITCHED[name][0]["depth"])
            self.config.ISON.update(switches)
        model = self.network().double()
        formula.fill_(model)
        return model, self.optim.construct_optim(model, 1), self.config.ISON.ORTHO_COEFF

    def recipe(self) -> dict[str, float]:
        solver = self.config.SOLVER
        return {
            "lr": solver.BASE_LR,
            "momentum": solver.MOMENTUM,
            "weight_decay": solver.WEIGHT_DECAY,
            "gamma": self.config.ISON.ORTHO_COEFF,
            "dropout": self.config.ISON.DROPOUT_RATE,
        }


def ours(
    name: str, recipe: dict[str, float], device: torch.device | str = "cpu"
) -> tuple[nn.Module, torch.optim.Optimizer, isonet_fast.OrthoRegularizer]:
    make = getattr(isonet_fast.models, name) if name in CONFIGS else partial(ISONet, **SWITCHED[name][0], dropout=0.0)
    model = make().double()
    formula.fill_(model)
    model.to(device)
    groups = isonet_fast.param_groups(model, recipe["lr"], recipe["weight_decay"])
    optimizer = torch.optim.SGD(groups, lr=recipe["lr"], momentum=recipe["momentum"])
    return model, optimizer, isonet_fast.OrthoRegularizer(model, coeff=1.0)


def compare(name: str, official: Official) -> dict[str, Any]:
    """Train both side by side; print the largest differences; return the golden entry."""
    theirs, their_optimizer, gamma = official.build(name)
    recipe = official.recipe()
    model, optimizer, reg = ours(name, recipe)
    if [(n, p.shape) for n, p in theirs.state_dict().items()] != [(n, p.shape) for n, p in model.state_dict().items()]:
        raise SystemExit(f"{name}: names, shapes or order of the state_dict differ")
    if dropout_rate(model) != dropout_rate(theirs):
        raise SystemExit(f"{name}: dropout {dropout_rate(model)}, official {dropout_rate(theirs)}")

    worst = dict.fromkeys(("logits", "penalty", "gradient", "penalty gradient", "weights after"), 0.0)

    def note(what: str, ours_: Tensor, theirs_: Tensor, floor: float = 0.0) -> None:
        scale = max(theirs_.abs().max().item(), floor, 1e-300)
        worst[what] = max(worst[what], (ours_ - theirs_).abs().max().item() / scale)

    recorded = []
    pairs = zip(
        steps.train(model, reg, gamma, optimizer, STEPS),
        steps.train(theirs, theirs.ortho, gamma, their_optimizer, STEPS),
        strict=True,
    )
    for mine, reference in pairs:
        recorded.append(steps.summarise(reference, theirs))
        note("logits", mine.logits, reference.logits)
        note("penalty", mine.penalty, reference.penalty)
        if mine.penalty_grads.keys() != reference.penalty_grads.keys():
            raise SystemExit(f"{name}: other layers are penalised")
        # The official gradient of an SReLU bias is a difference of two sums: where nearly nothing is blocked it is
        # rounding alone (exactly 0 where ours is 3e-42), so it is compared on the scale of the network's gradients.
        floor = 1e-9 * max(grad.abs().max().item() for grad in reference.grads.values())
        for parameter, grad in reference.grads.items():
            note("gradient", mine.grads[parameter], grad, floor)
        for parameter, grad in reference.penalty_grads.items():
            note("penalty gradient", mine.penalty_grads[parameter], grad)
    for parameter, value in theirs.named_parameters():
        note("weights after", model.get_parameter(parameter).detach(), value.detach())
    entry = {"recipe": recipe, **steps.record(recorded, theirs)}
    note_dropout(name, model, theirs)
    note_convert(name, theirs, their_optimizer)
    print(f"{name:<11}", *(f"{what} {value:.1e}" for what, value in worst.items()), sep="  ", flush=True)
    return entry


def dropout_rate(model: nn.Module) -> float:
    return sum(module.p for module in model.modules() if isinstance(module, nn.Dropout))


def note_dropout(name: str, model: nn.Module, theirs: nn.Module) -> None:
    """In train mode too: one mask per seed, drawn at the same place."""
    outputs = []
    for network in (model, theirs):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(network.train()(formula.images()))
    if not torch.allclose(*outputs, rtol=1e-9, atol=1e-9 * outputs[1].abs().max().item()):
        raise SystemExit(f"{name}: outputs differ in train mode")


def note_convert(name: str, theirs: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """`convert` on the official network: same outputs, gradients, state_dict, and its optimizer goes on working."""
    converted = isonet_fast.convert(copy.deepcopy(theirs).eval())
    theirs.eval()
    gradients = []
    for network in (theirs, converted):
        network.zero_grad()
        outputs = network(formula.images())
        outputs.square().sum().backward()
        gradients.append([outputs.detach(), *(p.grad for p in network.parameters())])
    for mine, reference in zip(*gradients, strict=True):
        if (mine - reference).abs().max() > 1e-9 * reference.abs().max():
            raise SystemExit(f"{name}: convert changes outputs or gradients")
    if [*theirs.state_dict()] != [*converted.state_dict()]:
        raise SystemExit(f"{name}: convert changes the state_dict")
    in_place = isonet_fast.convert(theirs)
    before = formula.measure(in_place.get_parameter("s4.b1.f.a.weight").detach(), 0)
    optimizer.step()
    if before == formula.measure(in_place.get_parameter("s4.b1.f.a.weight").detach(), 0):
        raise SystemExit(f"{name}: the optimizer built before convert has no effect")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official-repo", type=Path, required=True)
    parser.add_argument("--only", choices=[*CONFIGS, *SWITCHED], nargs="*", default=[*CONFIGS, *SWITCHED])
    options = parser.parse_args()
    official = Official(options.official_repo)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for name in options.only:
        golden[name] = compare(name, official)
        entries = (f"{json.dumps(key)}: {json.dumps(golden[key], separators=(',', ':'))}" for key in sorted(golden))
        GOLDEN.write_text("{\n" + ",\n".join(entries) + "\n}\n")


if __name__ == "__main__":
    main()
