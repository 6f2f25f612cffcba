"""Trials of wrong arguments: one argument of a public function is replaced by something that it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import isonet_fast
from isonet_fast import diagnostics, functional, init
from isonet_fast.models import isonet_cifar, load_official

from .case import Case
from .check import attempt, refused, same_bits


class Call(NamedTuple):
    """A function and valid arguments for it, made anew for each trial."""

    function: Callable[..., Any]
    valid: Callable[[], dict[str, Any]]
    fixed: tuple[str, ...] = ()  # arguments of PyTorch's own constructors


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 1), isonet_fast.SReLU(2), nn.Conv2d(2, 2, 3))


def _accumulate(grad_scale: Any) -> Any:
    return isonet_fast.OrthoRegularizer(_model()).accumulate_grad_(grad_scale)


def _layer_forward(x: Any) -> Any:
    return isonet_fast.SReLU(3)(x)


def _join_forward(shortcut: Any, branch: Any, scale: Any) -> Any:
    return isonet_fast.ResidualSReLU(3)(shortcut, branch, scale)


CALLABLE = ("coeff", "filter")
CONSTRUCTED = ("in_channels", "out_channels", "kernel_size", "in_features", "out_features")
CALLS: dict[str, Call] = {
    "srelu": Call(functional.srelu, lambda: dict(x=torch.randn(2, 3, 4), bias=torch.randn(3), inplace=False)),
    "residual_srelu": Call(
        functional.residual_srelu,
        lambda: dict(
            shortcut=torch.randn(2, 3, 4),
            branch=torch.randn(2, 3, 4),
            bias=torch.randn(3),
            scale=torch.randn(1),
            inplace=False,
        ),
    ),
    "orthogonality_loss": Call(
        functional.orthogonality_loss,
        lambda: dict(weights=torch.randn(4, 2, 3, 3), stride=1, dilation=1, groups=1, penalty="isonet", precision=None),
    ),
    "orthogonality_loss of a list": Call(
        functional.orthogonality_loss,
        lambda: dict(weights=[torch.randn(4, 2, 3), torch.randn(2, 2)], stride=[1, 1], dilation=[1, 1], groups=[2, 1]),
    ),
    "delta_": Call(init.delta_, lambda: dict(weight=torch.randn(4, 2, 3, 3), groups=1, stride=1)),
    "SReLU": Call(isonet_fast.SReLU, lambda: dict(num_channels=3, init=-1.0, inplace=False)),
    "SReLU's forward": Call(_layer_forward, lambda: dict(x=torch.randn(2, 3, 4))),
    "ResidualSReLU": Call(isonet_fast.ResidualSReLU, lambda: dict(num_channels=3, init=-1.0)),
    "ResidualSReLU's forward": Call(
        _join_forward, lambda: dict(shortcut=torch.randn(2, 3, 4), branch=torch.randn(2, 3, 4), scale=None)
    ),
    "SharedScale": Call(isonet_fast.SharedScale, lambda: dict(init=1.0)),
    "OrthoConv2d": Call(
        isonet_fast.OrthoConv2d,
        lambda: dict(in_channels=2, out_channels=4, kernel_size=3, penalty="lorth"),
        CONSTRUCTED,
    ),
    "OrthoLinear": Call(
        isonet_fast.OrthoLinear, lambda: dict(in_features=2, out_features=4, penalty="matrix"), CONSTRUCTED
    ),
    "OrthoRegularizer": Call(
        isonet_fast.OrthoRegularizer,
        lambda: dict(model=_model(), coeff=1e-4, penalty=None, filter=None, interval=1, precision=None),
    ),
    "accumulate_grad_": Call(_accumulate, lambda: dict(grad_scale=1.0)),
    "convert": Call(isonet_fast.convert, lambda: dict(model=_model())),
    "param_groups": Call(isonet_fast.param_groups, lambda: dict(model=_model(), lr=0.1, weight_decay=1e-4)),
    "singular_values": Call(diagnostics.singular_values, lambda: dict(conv=nn.Conv2d(2, 2, 3), input_size=4)),
    "isometry_report": Call(diagnostics.isometry_report, lambda: dict(model=_model(), input_size=(2, 4, 4))),
    "isonet_cifar": Call(isonet_cifar, lambda: dict(depth=8, residual=False, width=1, num_classes=2, in_channels=1)),
    "load_official": Call(load_official, lambda: dict(model=_model(), path="/nonexistent/file.pt")),
}
JUNK: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "-1": lambda: -1,
    "0": lambda: 0,
    "1.5": lambda: 1.5,
    "nan": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "10**400": lambda: 10**400,
    "2**63 + 1": lambda: 2**63 + 1,
    "1j": lambda: 1j,
    "text": lambda: "2",
    "bytes": lambda: b"\xff",
    "empty list": list,
    "empty tuple": lambda: (),
    "dict": lambda: {"a": 1},
    "list of numbers": lambda: [1, 2],
    "list of None": lambda: [None, None],
    "tuple of texts": lambda: ("1", "2"),
    "object": object,
    "class": lambda: nn.Conv2d,
    "function": lambda: len,
    "module": lambda: nn.ReLU(),
    "empty module": lambda: nn.Sequential(),
    "dtype": lambda: torch.float32,
    "numpy number": lambda: np.float64(0.5),
    "numpy array": lambda: np.zeros((2, 3)),
    "integer tensor": lambda: torch.ones(2, 3, 4, dtype=torch.int64),
    "boolean tensor": lambda: torch.ones(3, dtype=torch.bool),
    "complex tensor": lambda: torch.randn(2, 3, 4, dtype=torch.complex64),
    "number in a tensor": lambda: torch.tensor(0.5),
    "integer in a tensor": lambda: torch.tensor(1),
    "two numbers in a tensor": lambda: torch.ones(2),
    "empty tensor": lambda: torch.empty(0),
    "tensor of another shape": lambda: torch.randn(2, 3, 5),
    "tensor of six dimensions": lambda: torch.randn(1, 1, 1, 1, 1, 1),
    "float64 tensor": lambda: torch.randn(2, 3, 4, dtype=torch.float64),
    "sparse tensor": lambda: torch.randn(2, 3, 4).to_sparse(),
    "sparse matrix": lambda: torch.eye(3).to_sparse_csr(),
    "mkldnn tensor": lambda: torch.randn(2, 3, 4).to_mkldnn(),
    "nested tensor": lambda: torch.nested.nested_tensor([torch.ones(3, 2), torch.ones(3, 4)]),
    "quantized tensor": lambda: torch.quantize_per_tensor(torch.randn(2, 3, 4), 0.1, 0, torch.qint8),
    "conjugate tensor": lambda: torch.randn(2, 3, 4, dtype=torch.complex64).conj(),
    "negative-bit tensor": lambda: torch.randn(2, 3, 4, dtype=torch.complex64).conj().imag,
    "meta tensor": lambda: torch.empty(2, 3, 4, device="meta"),
    "float8 tensor": lambda: torch.zeros(2, 3, 4).to(torch.float8_e4m3fn),
}


def arguments(case: Case) -> None:
    """Accepted or refused by an error of ours that names the argument; what was given with it keeps its bits."""
    case.seed()
    call = CALLS[case.choose("call", list(CALLS))]
    given = call.valid()
    name = case.choose("argument", [name for name in given if name not in call.fixed])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        junk = [kind for kind in JUNK if not (name in CALLABLE and "module" in kind)]  # can be called, and raises then
        given[name] = JUNK[case.choose("given", junk)]()
        kept = {other: value.clone() for other, value in given.items() if _plain(value)}
        _, error = attempt(lambda: call.function(**given))
    told = f"{case.made['call']}({name}={case.made['given']})"
    if error is not None and not (isinstance(error, OSError) and "path" in given):
        refused(error, list(given), told)  # which of two that disagree is wrong, is a matter of opinion
    for other, value in kept.items():
        if error is not None:
            same_bits(f"{other} in {told}", given[other], value)


def _plain(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and (value.dtype in (torch.float32, torch.float64) and not value.is_nested)
    )
