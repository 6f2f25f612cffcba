"""Trials of what takes a whole model: the regularizer in both forms, convert, param_groups, diagnostics, networks."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import isonet_fast
from isonet_fast import OrthoRegularizer, SharedScale, SReLU, functional, reference
from isonet_fast.models import isonet_cifar

from .case import Case, Failure
from .check import accurate, same_bits
from .penalty import CONVOLUTIONS, PENALTIES, Geometry, check_gradient, check_loss, geometry

KINDS = ("ours", "ours", "plain", "linear", "plain linear", "transposed", "srelu", "scale")


def _member(case: Case, name: str, dtype: torch.dtype) -> nn.Module:
    """A small layer of any kind."""
    kind = case.choose(f"{name} kind", KINDS)
    shape, stride, dilation, groups = geometry(case, name)
    dims, inputs = max(1, len(shape) - 2), groups * shape[1]
    own = case.choose(f"{name} penalty", (*PENALTIES, None))
    arguments: dict[str, Any] = dict(stride=stride, dilation=dilation, groups=groups, bias=False)
    kernel = shape[2:] or 1
    if kind == "ours":
        module: nn.Module = CONVOLUTIONS[dims][0](inputs, shape[0], kernel, **arguments, penalty=own)
    elif kind == "plain":
        module = CONVOLUTIONS[dims][1](inputs, shape[0], kernel, **arguments)
    elif kind == "linear":
        module = isonet_fast.OrthoLinear(shape[1], shape[0], penalty=own)
    elif kind == "plain linear":
        module = nn.Linear(shape[1], shape[0])
    elif kind == "transposed":
        module = nn.ConvTranspose1d(shape[1], 2, 3)
    else:
        module = SReLU(3) if kind == "srelu" else SharedScale(0.5)
    module = module.to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return module.requires_grad_(not case.flag(f"{name} frozen", 5))


def _model(case: Case, dtype: torch.dtype) -> nn.ModuleDict:
    """None to four layers by name; the last may share the weight of one before it."""
    count = case.choose("layers", (1, 2, 3, 4, 0))
    model = nn.ModuleDict({f"layer{n}": _member(case, f"layer {n}", dtype) for n in range(count)})
    if count and case.flag("shared", 5):
        model["again"] = copy.deepcopy(model["layer0"])
        for name, parameter in model["layer0"].named_parameters():
            setattr(model["again"], name, parameter)
    return model


def regularizer(case: Case) -> None:
    """OrthoRegularizer: value, `last`, both forms of the gradient, interval, frozen and shared weights."""
    case.seed()
    model = _model(case, case.dtype("dtype", ("float32", "float32", "float64", "bfloat16")))
    penalty = case.choose("penalty", (None, None, *PENALTIES))
    coeff = case.choose("coeff", (1.0, 1e-4, 0.0, "by name"))
    every = case.choose("filter", ("official", "all", "none")) if case.flag("filtered") else "official"
    interval = case.choose("interval", (1, 1, 2, 3))
    chosen = {"official": None, "all": lambda name, module: True, "none": lambda name, module: False}[every]
    by_name = lambda name, module: 0.1 * (1 + int(name.removeprefix("layer") or 0)) if name != "again" else 7.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model with nothing to penalise
        reg = OrthoRegularizer(model, by_name if coeff == "by name" else coeff, penalty, chosen, interval)
    included = _included(model, penalty, every)
    coefficients = [by_name(name, None) if coeff == "by name" else coeff for name, *_ in included]
    for parameter in model.parameters():
        if parameter.requires_grad and case.flag("with gradients"):
            parameter.grad = torch.randn_like(parameter)
    for call in range(1, interval + 1):
        accumulate = case.flag(f"accumulate {call}")
        scale = case.choose("grad_scale", (1.0, 1.0, 0.5, 128)) if accumulate else 1.0
        before = {p: None if p.grad is None else p.grad.clone() for p in model.parameters()}
        value = reg.accumulate_grad_(scale) if accumulate else reg()
        if not accumulate and value.requires_grad:
            value.backward()
        due = interval if call == interval else 0
        _check_penalty(model, reg, value, included, [due * c for c in coefficients], scale, before)


def _included(model: nn.ModuleDict, penalty: str | None, every: str) -> list[tuple[str, Tensor, Geometry, str]]:
    """(name, weight, geometry, penalty) of what the documented rule takes, each Parameter once."""
    rows, seen = [], set()
    for name, module in model.items():
        ours = isinstance(module, (isonet_fast.OrthoLinear, *(kind for kind, _ in CONVOLUTIONS.values())))
        convolution = isinstance(module, tuple(plain for _, plain in CONVOLUTIONS.values()))
        own = module.penalty if ours else "isonet"
        official = not convolution or (module.kernel_size != (7, 7) and module.weight.shape[1] != 3)
        if not (ours or convolution) or own is None or not {"official": official, "all": True, "none": False}[every]:
            continue
        if id(module.weight) not in seen:
            seen.add(id(module.weight))
            shape = tuple(module.weight.shape)
            how = (module.stride, module.dilation, module.groups) if convolution else (1, 1, 1)
            rows.append((name, module.weight, Geometry(shape, *how), penalty or own))
    return rows


def _check_penalty(
    model: nn.Module, reg: Any, value: Tensor, included: list, factors: list[float], scale: float, before: dict
) -> None:
    exact = [weight.detach().double().requires_grad_() for _, weight, *_ in included]
    with torch.enable_grad():
        losses = [
            reference.orthogonality_loss(w, stride=g.stride, dilation=g.dilation, groups=g.groups, penalty=chosen)
            for w, (*_, g, chosen) in zip(exact, included, strict=True)
        ]
        total = sum((f * loss for f, loss in zip(factors, losses)), torch.zeros((), dtype=torch.float64))
    layers = [g for *_, g, _ in included]
    check_loss(value / max([1.0, *factors]), total / max([1.0, *factors]), layers, exact)
    if any(factors):
        unweighted = sum(losses, torch.zeros((), dtype=torch.float64))
        check_loss(reg.last, unweighted, layers, exact)
    grads = {id(weight): (f, loss, w) for f, loss, w, (_, weight, *_) in zip(factors, losses, exact, included)}
    for name, parameter in model.named_parameters():
        old = before[parameter]
        if id(parameter) not in grads or not parameter.requires_grad:
            if (parameter.grad is None) != (old is None):
                raise Failure("changed", f"the gradient of {name}")
            if old is not None:
                same_bits(f"the gradient of {name}", parameter.grad, old)
            continue
        factor, loss, w = grads[id(parameter)]
        expected = torch.autograd.grad(loss, w)[0] * factor * scale
        got = torch.zeros_like(expected) if parameter.grad is None else parameter.grad.double()
        if old is not None:
            expected = expected + old.double()
        largest = max(1.0, 0.0 if old is None else old.abs().max().item())
        check_gradient(f"gradient of {name}", got.to(parameter.dtype), expected, largest * w * max(1.0, factor * scale))


class OfficialSReLU(nn.Module):
    """SReLU as the official code has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.srelu_bias = nn.Parameter(torch.randn(1, channels, 1, 1))
        self.srelu_relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.srelu_relu(x - self.srelu_bias) + self.srelu_bias


OfficialSReLU.__name__ = "SReLU"


def convert(case: Case) -> None:
    """convert: the same outputs and Parameters; every exact convolution and official SReLU is ours afterwards."""
    case.seed()
    channels, layers, converted = 2, [], 0
    dims = case.choose("dimensions", (2, 1, 3))
    for n in range(case.choose("layers", (1, 2, 3, 4))):
        kind = case.choose(f"layer {n} kind", ("convolution", "ours", "relu", "norm", "srelu")[: 5 if dims == 2 else 4])
        if kind in ("convolution", "ours"):
            outputs = case.choose(f"layer {n} outputs", (2, 4, 6))
            settings = dict(groups=case.choose(f"layer {n} groups", (1, 2)), bias=case.flag(f"layer {n} with bias"))
            layers.append(CONVOLUTIONS[dims][kind == "convolution"](channels, outputs, 3, padding=1, **settings))
            channels = outputs
        elif kind == "srelu":
            layers.append(OfficialSReLU(channels))
        else:
            layers.append(nn.ReLU() if kind == "relu" else nn.GroupNorm(1, channels))
        converted += kind in ("convolution", "srelu")
    model = nn.Sequential(*layers)
    x = torch.randn(2, 2, *[4] * dims)
    before, parameters, state = model(x), dict(model.named_parameters()), list(model.state_dict())
    after = isonet_fast.convert(model)
    if after is not model or list(after.state_dict()) != state:
        raise Failure("changed", "convert returns another model or state_dict")
    if any(parameters[name] is not parameter for name, parameter in after.named_parameters()):
        raise Failure("changed", "convert exchanged a Parameter")
    accurate("output", after(x), before.double(), absolute=1e-6 * before.abs().max().item() + 1e-6)
    own = (SReLU, *(ours for ours, _ in CONVOLUTIONS.values()))
    if sum(type(a) is not type(b) for a, b in zip(after, layers)) != converted or not all(
        isinstance(a, own) for a, b in zip(after, layers) if type(a) is not type(b)
    ):
        raise Failure("wrong value", f"converted {after}")


def param_groups(case: Case) -> None:
    """param_groups: every parameter in one group, with the documented rates."""
    case.seed()
    model = _model(case, torch.float32)
    lr, decay = case.choose("lr", (0.1, 1.0)), case.choose("weight_decay", (1e-4, 0.0))
    found = {
        id(p): (g["lr"], g["weight_decay"])
        for g in isonet_fast.param_groups(model, lr=lr, weight_decay=decay)
        for p in g["params"]
    }
    expected = {}
    for module in model.values():
        rates = {SReLU: (lr, 0.0), SharedScale: (lr / 10, decay)}.get(type(module), (lr, decay))
        expected |= {id(p): rates for p in module.parameters()}
    groups = isonet_fast.param_groups(model, lr=lr, weight_decay=decay)
    if found != expected or sum(len(g["params"]) for g in groups) != len(expected):
        raise Failure("wrong value", f"groups {[(len(g['params']), g['lr'], g['weight_decay']) for g in groups]}")


def singular_values(case: Case) -> None:
    """diagnostics.singular_values: those of the operator written out as a matrix on a circular grid."""
    case.seed()
    dims = case.choose("dimensions", (1, 2))
    groups, outputs, inputs = (case.choose(n, (1, 2, 3)) for n in ("groups", "outputs", "inputs"))
    kernel, stride, dilation = (
        tuple(case.choose(f"{n} {d}", options) for d in range(dims))
        for n, options in (("kernel", (1, 2, 3)), ("stride", (1, 2, 3)), ("dilation", (1, 2)))
    )
    conv = CONVOLUTIONS[dims][0](
        groups * inputs, groups * outputs, kernel, stride=stride, dilation=dilation, groups=groups, dtype=torch.float64
    )
    nn.init.normal_(conv.weight)
    least = [e * (k - 1) + 1 for e, k in zip(dilation, kernel)]
    size = tuple(-(-n // s) * s for n, s in zip(least, stride))
    found = isonet_fast.diagnostics.singular_values(conv, size)
    expected = torch.linalg.svdvals(_operator(conv, size)).sort(descending=True).values
    if found.shape != expected.shape:
        raise Failure("wrong shape", f"{tuple(found.shape)} instead of {tuple(expected.shape)}")
    accurate("singular values", found, expected, absolute=1e-6)


def _operator(conv: Any, size: tuple[int, ...]) -> Tensor:
    """The convolution as a matrix: y[m] = sum over taps u of A_u x[(stride m + dilation u) mod size]."""
    places = list(itertools.product(*map(range, size)))
    columns = {place: n for n, place in enumerate(places)}
    out = list(itertools.product(*(range(n // s) for n, s in zip(size, conv.stride))))
    (outputs, inputs), per = conv.weight.shape[:2], conv.weight.shape[0] // conv.groups
    matrix = torch.zeros(len(out), outputs, len(places), conv.groups * inputs, dtype=torch.float64)
    for m, place in enumerate(out):
        for tap in itertools.product(*map(range, conv.kernel_size)):
            read = columns[
                tuple((s * p + e * u) % n for s, p, e, u, n in zip(conv.stride, place, conv.dilation, tap, size))
            ]
            for g in range(conv.groups):
                rows, cols = slice(g * per, (g + 1) * per), slice(g * inputs, (g + 1) * inputs)
                matrix[m, rows, read, cols] += conv.weight.detach()[(rows, slice(None), *tap)]
    return matrix.flatten(0, 1).flatten(1)


def network(case: Case) -> None:
    """A small network: logits and every gradient as with the reference's operators in the layers' place."""
    case.seed()
    residual = case.flag("residual")
    net = isonet_cifar(8, residual=residual, width=case.choose("width", (1, 2, 3)), num_classes=3).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    if case.flag("channels last"):
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    weights = torch.randn(2, 3, dtype=torch.float64)
    found, expected = (_results(net, x, weights, own) for own in (True, False))
    for (name, *_), a, b in zip([("logits",), *net.named_parameters()], found, expected, strict=True):
        accurate(name, a, b)


def _results(net: nn.Module, x: Tensor, weights: Tensor, own: bool) -> list[Tensor]:
    kept = functional.srelu, functional.residual_srelu
    if not own:
        functional.srelu = lambda x, bias, *how: reference.srelu(x, bias)
        functional.residual_srelu = lambda a, b, bias, scale, *how: reference.residual_srelu(a, b, bias, scale)
    try:
        logits = net(x)
    finally:
        functional.srelu, functional.residual_srelu = kept
    return [logits, *torch.autograd.grad((logits * weights).sum(), list(net.parameters()))]


def isometry_report(case: Case) -> None:
    """diagnostics.isometry_report: a row for each convolution, with its own singular values."""
    case.seed()
    size = case.choose("size", (4, 6))
    net = nn.Sequential(
        isonet_fast.OrthoConv2d(1, 2, 3, padding=1), SReLU(2), nn.Conv2d(2, 2, case.choose("kernel", (1, 3)))
    )
    report = isonet_fast.diagnostics.isometry_report(net, (1, size, size))
    if [row.name for row in report] != ["0", "2"]:
        raise Failure("wrong value", f"rows {[row.name for row in report]}")
    for row, conv in zip(report, (net[0], net[2])):
        values = isonet_fast.diagnostics.singular_values(conv, row.grid)
        for found, expected in ((row.smallest, values[-1]), (row.largest, values[0])):
            accurate(row.name, torch.tensor(found, dtype=torch.float64), expected)


def shared_scale(case: Case) -> None:
    """SharedScale: x -> s x, and the same folded into a convolution."""
    case.seed()
    dims = case.choose("dimensions", (2, 1, 3))
    dtype = case.dtype("dtype", ("float64", "float32"))
    conv = CONVOLUTIONS[dims][1](2, 3, 3, bias=case.flag("with bias"), dtype=dtype)
    module = SharedScale(case.choose("init", (1.0, 0.0, -0.5)), dtype=dtype)
    x = torch.randn(2, 2, *[4] * dims, dtype=dtype)
    scaled, folded = module(conv(x)), module.fold(conv, x)
    accurate("folded", folded, scaled.double(), absolute=1e-5 if dtype == torch.float32 else 1e-12)
    leaves = [module.scale, *conv.parameters()]
    upstream = torch.randn_like(scaled)
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (folded, scaled))):
        accurate("gradient of folded", a, b.double(), absolute=1e-4 if dtype == torch.float32 else 1e-10)
