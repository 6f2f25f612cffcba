"""Values and memory layouts: an operand is a view or a computed arrangement of a dense leaf, so that the same program
runs on the leaf in any dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .case import Case

Shape = tuple[int, ...]
FLOATS = ("float32", "float64", "float16", "bfloat16")


class Arrangement(NamedTuple):
    """A leaf of `shape` holds the values; `view(leaf)` is the operand."""

    shape: Shape
    view: Callable[[Tensor], Tensor]


def _contiguous(s: Shape) -> Arrangement:
    return Arrangement(s, lambda t: t)


def _channels_last(s: Shape) -> Arrangement:
    return Arrangement((s[0], *s[2:], s[1]), lambda t: t.movedim(-1, 1))


def _batch_last(s: Shape) -> Arrangement:
    return Arrangement((*s[1:], s[0]), lambda t: t.movedim(-1, 0))


def _transposed(s: Shape) -> Arrangement:
    return Arrangement((*s[:-2], s[-1], s[-2]), lambda t: t.transpose(-1, -2))


def _reversed(s: Shape) -> Arrangement:
    return Arrangement(s[::-1], lambda t: t.permute(*range(t.dim())[::-1]))


def _sliced(s: Shape) -> Arrangement:
    return Arrangement((*s[:-1], s[-1] + 3), lambda t: t[..., 1 : 1 + s[-1]])


def _stepped(s: Shape) -> Arrangement:
    return Arrangement((*s[:-1], 2 * s[-1]), lambda t: t[..., ::2])


def _channel_slice(s: Shape) -> Arrangement:
    return Arrangement((s[0], s[1] + 2, *s[2:]), lambda t: t[:, 1 : 1 + s[1]])


def _batch_slice(s: Shape) -> Arrangement:
    return Arrangement((s[0] + 1, *s[1:]), lambda t: t[1:])


def _channels_last_slice(s: Shape) -> Arrangement:
    return Arrangement((s[0], *s[2:], s[1] + 3), lambda t: t[..., : s[1]].movedim(-1, 1))


def _offset(s: Shape) -> Arrangement:
    numel = torch.Size(s).numel()
    return Arrangement((numel + 1,), lambda t: t[1:].view(s))


def _reshaped(s: Shape) -> Arrangement:
    return Arrangement((torch.Size(s).numel(),), lambda t: t.view(s))


def _flipped(s: Shape) -> Arrangement:
    return Arrangement(s, lambda t: t.flip(-1).contiguous().flip(-1))


def _expanded(s: Shape) -> Arrangement:
    return Arrangement((*s[:-1], 1), lambda t: t.expand(s))


def _expanded_batch(s: Shape) -> Arrangement:
    return Arrangement((1, *s[1:]), lambda t: t.expand(s))


def _windows(s: Shape) -> Arrangement:
    """Overlapping windows: element i of the last dimension is shared by neighbours of the one before."""
    return Arrangement((*s[:-2], s[-2] + s[-1]), lambda t: t.unfold(-1, s[-1], 1)[..., : s[-2], :])


def _chunk(s: Shape) -> Arrangement:
    return Arrangement((*s[:-1], 2 * s[-1]), lambda t: t.split(s[-1], -1)[1] if s[-1] else t)


def _unbound(s: Shape) -> Arrangement:
    return Arrangement((2, *s), lambda t: t.unbind(0)[1])


def _negative(s: Shape) -> Arrangement:
    """A tensor with PyTorch's negative bit, where the dtype has a complex one."""
    return Arrangement(s, lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag if t.dtype in COMPLEX else t * 1)


def _made_under_no_grad(s: Shape) -> Arrangement:
    @torch.no_grad()
    def view(leaf: Tensor) -> Tensor:
        return leaf[1:]

    return Arrangement((s[0] + 1, *s[1:]), view)


COMPLEX = (torch.float32, torch.float64)
LAYOUTS: dict[str, Callable[[Shape], Arrangement]] = {
    "contiguous": _contiguous,
    "channels last": _channels_last,
    "reshaped": _reshaped,
    "sliced": _sliced,
    "offset": _offset,
    "transposed": _transposed,
    "batch last": _batch_last,
    "reversed": _reversed,
    "stepped": _stepped,
    "channel slice": _channel_slice,
    "batch slice": _batch_slice,
    "channels last slice": _channels_last_slice,
    "flipped": _flipped,
    "expanded": _expanded,
    "expanded batch": _expanded_batch,
    "windows": _windows,
    "chunk": _chunk,
    "unbind": _unbound,
    "negative": _negative,
    "no_grad": _made_under_no_grad,
}
SEVERAL_VIEWS = ("chunk", "unbind")  # one call made several views: autograd refuses to change one of them in place
SHARING = ("expanded", "expanded batch", "windows")  # elements may share memory


def layout(case: Case, name: str, shape: Shape) -> Arrangement:
    return LAYOUTS[case.choose(f"{name} layout", [*["contiguous"] * 4, *LAYOUTS])](shape)


def shape(case: Case) -> Shape:
    """(N, C, ...) of two to five dimensions, small, sometimes empty."""
    rank = case.choose("rank", (2, 3, 4, 4, 5))
    sizes = (1, 2, 3, 5, 8, 9, 16, 17) if rank < 5 else (1, 2, 3, 4)
    batch = case.choose("N", (1, 2, 3, 4, 0) if rank > 2 else (1, 2, 3, 8, 33, 0))
    channels = case.choose("C", (1, 2, 3, 4, 5, 8, 16, 17, 33, 0) if rank < 5 else (1, 2, 3, 8, 0))
    rest = [case.choose(f"size {n}", sizes * 3 + (0,)) for n in range(rank - 2)]
    return (batch, channels, *rest)


def values(kind: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    """dyadic: eighths, whose sums and products every dtype holds exactly; normal: with a fifth of eighths, for ties."""
    eighths = torch.randint(-16, 17, shape) / 8
    if kind == "dyadic":
        return eighths.to(dtype)
    factor = {"normal": 1.0, "large": 100.0, "small": 1e-3}[kind]
    return torch.where(torch.rand(shape) < 0.2, eighths, torch.randn(shape) * factor).to(dtype)


KINDS = ("dyadic", "dyadic", "normal", "normal", "large", "small")
SPECIALS = {"none": (), "nan": (torch.nan,), "inf": (torch.inf, -torch.inf), "all": (torch.nan, torch.inf, -torch.inf)}


def sprinkle(case: Case, name: str, x: Tensor) -> Tensor:
    """Some elements replaced by NaN, infinities; in place."""
    chosen = SPECIALS[case.choose(f"{name} specials", ("none",) * 6 + ("nan", "inf", "all"))]
    for n, special in enumerate(chosen):
        x.view(-1)[n + 1 :: 7] = special
    return x
