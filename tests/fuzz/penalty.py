"""Trials of the orthogonality penalty: functional, layers, the regularizer's two forms, delta initialisation."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

import isonet_fast
from isonet_fast import functional, init, reference
from isonet_fast.geometry import Penalty

from . import tensors
from .case import Case, Failure
from .check import accurate, same_bits
from .tensors import Arrangement

PENALTIES = get_args(Penalty)
PRECISE = 1e-4  # of the larger of gradient and weight scale, in float32


class Geometry(NamedTuple):
    """How a weight (O, I/g, k...) is convolved."""

    shape: tuple[int, ...]
    stride: Any
    dilation: Any
    groups: int


def geometry(case: Case, name: str) -> Geometry:
    dims = case.choose(f"{name} dimensions", (2, 2, 2, 1, 1, 0, 3))
    kernels = (1, 2, 3, 5) if dims == 1 else (1, 2, 3, 3) if dims == 2 else (1, 2)
    kernel = tuple(case.choose(f"{name} kernel {n}", kernels) for n in range(dims))
    groups = case.choose(f"{name} groups", (1, 1, 1, 2, 3)) if dims else 1
    outputs = groups * case.choose(f"{name} outputs", (1, 2, 3, 4, 7, 8, 16))
    inputs = case.choose(f"{name} inputs", (1, 2, 3, 4, 5, 8, 17))
    stride, dilation = (
        case.choose(f"{name} {what}", (1, 1, 1, 2, 3) + (((2, 1, 3)[:dims],) if dims else ()))
        for what in ("stride", "dilation")
    )
    return Geometry((outputs, inputs, *kernel), stride, dilation, groups)


def weight(case: Case, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Arrangement]:
    """A leaf and how it becomes the weight: random at several scales, a delta, or nearly orthogonal."""
    layouts = {key: tensors.LAYOUTS[key] for key in WEIGHT_LAYOUTS if len(shape) > 2 or "channel" not in key}
    arrangement = layouts[case.choose(f"{name} layout", ["contiguous"] * 3 + list(layouts))](shape)
    leaf = torch.randn(arrangement.shape)
    kind = case.choose(f"{name} values", ("scaled", "scaled", "normal", "nearly orthogonal", "small", "large", "zero"))
    fan = math.prod(shape[1:])
    leaf *= {"normal": 1.0, "small": 1e-3, "large": 10.0, "zero": 0.0}.get(kind, fan**-0.5)
    if kind == "nearly orthogonal":
        flat = torch.zeros(shape[0], fan)
        nn.init.orthogonal_(flat)
        arrangement.view(leaf).copy_(flat.view(shape) + 1e-3 * torch.randn(shape))
    return leaf.to(dtype), arrangement


WEIGHT_LAYOUTS = ("contiguous", "channels last", "transposed", "reversed", "sliced", "stepped", "offset", "batch slice",
                  "channel slice", "flipped", "chunk", "unbind")  # fmt: skip


def orthogonality_loss(case: Case) -> None:
    """functional.orthogonality_loss of none to three weights, and its gradients."""
    case.seed()
    count = case.choose("weights", (1, 1, 1, 2, 3, 0))
    penalty = case.choose("penalty", PENALTIES)
    layers = [geometry(case, f"weight {n}") for n in range(count)]
    leaves, views = [], []
    for n, layer in enumerate(layers):
        dtype = case.dtype(f"weight {n} dtype", ("float32",) * 3 + tensors.FLOATS)
        leaf, arrangement = weight(case, f"weight {n}", layer.shape, dtype)
        leaves.append(leaf.requires_grad_(not case.flag(f"weight {n} frozen", 6)))
        views.append(arrangement.view)
    settings = dict(penalty=penalty, stride=[g.stride for g in layers], dilation=[g.dilation for g in layers])
    settings["groups"] = [g.groups for g in layers]
    weights = [view(leaf) for view, leaf in zip(views, leaves, strict=True)]
    if count == 1 and case.flag("alone"):
        weights, settings = weights[0], {k: v[0] if isinstance(v, list) else v for k, v in settings.items()}
    precision = case.choose("precision", (None, None, "highest"))
    loss = functional.orthogonality_loss(weights, **settings, precision=precision)
    factor = case.choose("gradient", (1.0, 1.0, 0.5, -3.0, 1e-3))
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    with torch.enable_grad():
        wide = [view(leaf) for view, leaf in zip(views, exact, strict=True)]
        expected = reference.orthogonality_loss(wide, **{**settings, **_lists(settings)})
    check_loss(loss, expected, layers, exact)
    trained = [n for n, leaf in enumerate(leaves) if leaf.requires_grad]
    if loss.requires_grad != bool(trained):
        raise Failure("wrong derivatives", f"requires_grad is {loss.requires_grad} for {len(trained)} trained weights")
    if trained:
        grads = torch.autograd.grad(loss, [leaves[n] for n in trained], loss.new_tensor(factor))
        right = torch.autograd.grad(expected, [exact[n] for n in trained], expected.new_tensor(factor))
        for n, grad, wanted in zip(trained, grads, right, strict=True):
            check_gradient(f"d weight {n}", grad, wanted, exact[n] * abs(factor))


def _lists(settings: dict[str, Any]) -> dict[str, list]:
    return {k: v if isinstance(v, list) else [v] for k, v in settings.items() if k != "penalty"}


def check_loss(loss: Tensor, expected: Tensor, layers: list[Geometry], exact: list[Tensor]) -> None:
    """Rounding is relative to the grams' elements, which the loss squares, and to the constant that lorth subtracts."""
    ones = sum(g.shape[0] * max(1, math.prod(g.shape[1:])) for g in layers)
    size = max((float(w.detach().square().sum()) for w in exact), default=0.0)
    float64 = loss.dtype == torch.float64 and all(w.dtype == torch.float64 for w in exact)
    accurate("loss", loss.detach(), expected.detach(), absolute=(1e-9 if float64 else 1e-6) * (ones + size))


def check_gradient(what: str, grad: Tensor, expected: Tensor, exact: Tensor) -> None:
    """At most 1e-4 of the larger of gradient and weight scale in float32; half precision is rounded once more."""
    if not expected.numel():
        return
    scale = max(expected.abs().max().item(), exact.detach().abs().max().item())
    fits = expected.abs() < 0.99 * torch.finfo(grad.dtype).max  # else it is rounded to infinity
    tolerance = {torch.float32: PRECISE, torch.float64: 1e-9}.get(grad.dtype)
    if tolerance is None:
        tolerance = PRECISE + torch.finfo(grad.dtype).eps
        scale = max(scale, torch.finfo(grad.dtype).tiny)
    accurate(what, grad.where(fits, 0), expected.where(fits, 0), absolute=tolerance * scale)


def delta_(case: Case) -> None:
    """init.delta_: dirac_ at stride 1, and always a minimum of the lorth penalty."""
    case.seed()
    layer = geometry(case, "weight")
    leaf, arrangement = weight(case, "weight", layer.shape, case.dtype("dtype", ("float32", *tensors.FLOATS)))
    view = arrangement.view(leaf)
    flipped = case.made["weight layout"] == "flipped"
    before = leaf.clone()
    stride = layer.stride if case.flag("strided") else 1
    filled = init.delta_(view, groups=layer.groups, stride=stride)
    if filled is not view:
        raise Failure("wrong value", "delta_ does not return its argument")
    if len(layer.shape) > 2 and stride == 1:
        expected = nn.init.dirac_(torch.empty(layer.shape, dtype=leaf.dtype), layer.groups)
        same_bits("delta", filled, expected)
    loss = reference.orthogonality_loss(filled.double(), stride=stride, groups=layer.groups, penalty="lorth")
    accurate("lorth penalty of a delta", loss, torch.zeros((), dtype=torch.float64), absolute=1e-9)
    if not flipped:
        with torch.no_grad():
            view.copy_(arrangement.view(before))
        same_bits("what surrounds the weight", leaf, before)


CONVOLUTIONS = {1: (isonet_fast.OrthoConv1d, nn.Conv1d), 2: (isonet_fast.OrthoConv2d, nn.Conv2d),
                3: (isonet_fast.OrthoConv3d, nn.Conv3d)}  # fmt: skip


def layer(case: Case) -> None:
    """OrthoConv1d to 3d and OrthoLinear: a delta at first, their parent's forward, the penalty of their own weight."""
    case.seed()
    shape, stride, dilation, groups = geometry(case, "weight")
    penalty = case.choose("penalty", (*PENALTIES, None))
    dtype = case.dtype("dtype", ("float32", "float32", "float64", "bfloat16"))
    bias = case.flag("with bias")
    dims = len(shape) - 2
    if dims:
        ours, parent = CONVOLUTIONS[dims]
        arguments = dict(stride=stride, dilation=dilation, groups=groups, bias=bias, dtype=dtype)
        arguments["padding"] = case.choose("padding", (0, 1, 2))
        arguments["padding_mode"] = case.choose("padding mode", ("zeros", "zeros", "circular", "replicate"))
        positional = (groups * shape[1], shape[0], shape[2:])
    else:
        ours, parent = isonet_fast.OrthoLinear, nn.Linear
        arguments, positional = dict(bias=bias, dtype=dtype), (shape[1], shape[0])
    module, plain = ours(*positional, **arguments, penalty=penalty), parent(*positional, **arguments)
    _starts_as_a_delta(module, stride, dilation, groups)
    module.load_state_dict(plain.state_dict())
    sizes = [k * d for k, d in zip(shape[2:], _each(dilation, dims), strict=True)]  # at least the dilated kernel
    x = torch.randn(case.choose("N", (1, 2, 3)), positional[0], *[n + 2 for n in sizes]).to(dtype)
    # oneDNN's bfloat16 convolution reads memory that nobody wrote, on a processor with AMX: nn.Conv3d(4, 7, (1, 1, 2),
    # stride=(2, 1, 3)) of torch 2.13 gives other values at every call.
    if not (dims and dtype == torch.bfloat16):
        same_bits("output", module(x).detach(), plain(x).detach())
    loss = module.orthogonality_loss()
    exact = plain.weight.detach().double().requires_grad_()
    if penalty is None:
        accurate("loss", loss.detach(), torch.zeros((), dtype=torch.float64))
        return
    setting = dict(stride=stride, dilation=dilation, groups=groups, penalty=penalty)
    expected = reference.orthogonality_loss(exact, **setting)
    check_loss(loss, expected, [Geometry(shape, stride, dilation, groups)], [exact])
    loss.backward()
    check_gradient("d weight", module.weight.grad, torch.autograd.grad(expected, exact)[0], exact)
    copied = copy.deepcopy(module)
    if repr(copied) != repr(module) or copied.penalty != penalty:
        raise Failure("changed", f"a copy is {copied!r}")


def _starts_as_a_delta(module: nn.Module, stride: Any, dilation: Any, groups: int) -> None:
    dims = module.weight.dim() - 2
    cell = tuple(s // math.gcd(s, e) for s, e in zip(_each(stride, dims), _each(dilation, dims), strict=True))
    expected = init.delta_(torch.empty_like(module.weight), groups, cell if module.penalty == "lorth" and dims else 1)
    same_bits("initial weight", module.weight.detach(), expected.detach())
    if module.bias is not None:
        same_bits("initial bias", module.bias.detach(), torch.zeros_like(module.bias))


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else value
