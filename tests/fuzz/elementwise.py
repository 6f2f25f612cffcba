"""Trials of SReLU and the residual join: functional, layer and compiled; every layout; first and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from isonet_fast import ResidualSReLU, SReLU, functional, reference

from . import tensors
from .case import Case, Failure
from .check import accepted, accurate, attempt, refused, same_bits
from .tensors import Arrangement

Values = dict[str, Tensor]
ORDERS = 16  # in which plain PyTorch sums, where the first comes out too well by luck
COMPILED_ODDS = 1500  # a compilation takes as long as hundreds of calls


def srelu(case: Case) -> None:
    """functional.srelu and SReLU."""
    Trial(case, join=False).run()


def residual_srelu(case: Case) -> None:
    """functional.residual_srelu and ResidualSReLU."""
    Trial(case, join=True).run()


def _bias_forms(channels: int) -> dict[str, Arrangement]:
    return {
        "C": Arrangement((channels,), lambda t: t),
        "1C11": Arrangement((1, channels, 1, 1), lambda t: t),
        "column": Arrangement((channels, 1), lambda t: t),
        "stepped": Arrangement((2 * channels,), lambda t: t[::2]),
        "offset": Arrangement((channels + 1,), lambda t: t[1:]),
        "expanded": Arrangement((1,), lambda t: t.expand(channels)),
        "column slice": Arrangement((channels, 2), lambda t: t[:, :1]),
    }


SCALE_FORMS = {
    "scalar": Arrangement((), lambda t: t),
    "1": Arrangement((1,), lambda t: t),
    "1111": Arrangement((1, 1, 1, 1), lambda t: t),
    "slice": Arrangement((3,), lambda t: t[1:2]),
}


class Trial:
    """One call. `leaves` hold the values, `views` make the operands of them, so that any program runs in any dtype."""

    def __init__(self, case: Case, join: bool) -> None:
        self.case, self.join = case, join
        case.seed()
        self.shape = tensors.shape(case)
        self.kind = case.choose("values", tensors.KINDS)
        self.dtype = case.dtype("dtype", ("float32", *tensors.FLOATS))
        self.leaves: Values = {}
        self.views: dict[str, Callable[[Tensor], Tensor]] = {}
        self.target = "branch" if join else "x"  # what an in-place call writes over
        self._operands()
        self.inplace = case.flag("inplace", 3)
        self.layer = case.flag("layer", 4) and case.made["bias form"] == "1C11"
        self.named = case.flag("spatial_dims")  # the number of dimensions behind C
        self.unbatched = self.named and self.shape[0] == 1 and case.flag("unbatched")
        self.computed = not case.flag("from a leaf", 4)
        self.mode = case.choose("mode", ("grad",) * 12 + ("no_grad", "inference", "inference tensors"))
        self.writes = self.inplace and self.leaves.get(self.target, self.leaves.get("shortcut")).dtype == self.dtype
        self.observe_base = self.writes and case.flag("observe the base")
        self.double = self.mode == "grad" and case.flag("double backward", 3)
        frozen = {n for n in self.leaves if case.flag(f"{n} frozen", 4)}
        self.needs = [] if self.mode == "inference tensors" else [n for n in self.leaves if n not in frozen]

    def _operands(self) -> None:
        if self.join:
            alias = self.case.choose("alias", ("none",) * 8 + ("same", "overlap"))
            if alias == "none":
                self._add("shortcut", tensors.layout(self.case, "shortcut", self.shape))
                self._add("branch", tensors.layout(self.case, "branch", self.shape), mixed=True)
                self.dtype = torch.promote_types(self.dtype, self.leaves["branch"].dtype)
            else:
                self._add_aliases(alias)
        else:
            self._add("x", tensors.layout(self.case, "x", self.shape))
        forms = _bias_forms(self.shape[1])
        self._add("bias", forms[self.case.choose("bias form", list(forms))], mixed=True)
        if self.join and self.case.flag("with scale"):
            self._add("scale", SCALE_FORMS[self.case.choose("scale form", list(SCALE_FORMS))], mixed=True)

    def _add(self, name: str, arrangement: Arrangement, mixed: bool = False) -> None:
        dtype = self.dtype
        if mixed:
            chosen = self.case.choose(f"{name} dtype", ("same", "same", "same", "float32", *tensors.FLOATS))
            dtype = dtype if chosen == "same" else getattr(torch, chosen)
        if self.case.made.get("bias form") == "expanded" and dtype.itemsize == 2:
            dtype = torch.float32  # the sum of gradients that were rounded before is a matter of luck
        leaf = tensors.values(self.kind, arrangement.shape, dtype)
        self.leaves[name] = tensors.sprinkle(self.case, name, leaf)
        self.views[name] = arrangement.view

    def _add_aliases(self, alias: str) -> None:
        """shortcut and branch are one tensor, or views of one that overlap in part; the leaf is called shortcut."""
        last = self.shape[-1]
        if alias == "same":
            self._add("shortcut", tensors.layout(self.case, "shortcut", self.shape))
        else:
            self._add("shortcut", Arrangement((*self.shape[:-1], last + 1), lambda t: t[..., :last]))
            self.views["branch"] = lambda t: t[..., 1:]
        self.alias = alias

    alias = "none"

    def operands(self, leaves: Values) -> tuple[Values, Tensor]:
        """The arguments in their order, and what an in-place call's argument is a view of."""
        sources = {name: leaf * 1 if self.computed else leaf for name, leaf in leaves.items()}
        operands = {name: self.views[name](source) for name, source in sources.items()}
        if self.alias == "same":
            operands["branch"] = operands["shortcut"]
        elif self.alias == "overlap":
            operands["branch"] = self.views["branch"](sources["shortcut"])
        order = ("shortcut", "branch", "bias", "scale") if self.join else ("x", "bias")
        base = sources[self.target if self.target in sources else "shortcut"]
        return {name: operands[name] for name in order if name in operands}, base

    # What is expected

    def expectation(self, operands: Values, base: Tensor) -> tuple[str, set[str]]:
        """("right" | "refused" | "either", the arguments that the error may name)."""
        if self.layer and not self.named and len(self.shape) == 3 and self.shape[0] == self.shape[1]:
            return "refused", {"spatial_dims", "inplace"}  # (N, C, L) or (C, H, W)
        if self.inplace and "scale" in operands:
            return "refused", {"inplace", self.target}
        if not self.writes:
            return "right", set()
        target = operands[self.target]
        names = {"inplace", self.target, "bias"}
        grows = self.mode == "grad" and bool(self.needs)  # autograd would note the change
        leaf_name = self.target if self.target in self.leaves else "shortcut"
        if not target.numel():
            return "either", names
        if self.mode == "inference tensors":
            return "refused", names
        layout = self.case.made.get(f"{leaf_name} layout")
        if layout == "no_grad":
            return ("refused" if "bias" in self.needs and self.mode == "grad" and self.computed else "either"), names
        if self.mode == "grad" and not self.computed and leaf_name in self.needs and _shows(target, base):
            return "refused", names
        if torch.unique(_cells(target)).numel() < target.numel():
            return "refused", names  # elements share memory
        if layout in tensors.SEVERAL_VIEWS and grows:
            return ("refused" if leaf_name in self.needs else "either"), names
        return ("right" if self.alias == "none" else "either"), names

    # The programs: ours and the reference's run through the same one

    def program(self, call: Callable[..., Tensor], leaves: Values, grad: Tensor | None, seconds: Values) -> Values:
        """Output, first and second derivatives of `call`, by name."""
        leaves = {name: leaf.detach().requires_grad_(name in self.needs) for name, leaf in leaves.items()}
        operands, base = self.operands(leaves)
        output = call(operands)
        return self.derivatives(base if self.observe_base else output, leaves, grad, seconds)

    def derivatives(self, output: Tensor, leaves: Values, grad: Tensor | None, seconds: Values) -> Values:
        found = {"output": output}
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        if grad is None or not wanted:
            return found
        grad = grad.detach().requires_grad_(self.double)
        firsts = torch.autograd.grad(output, list(wanted.values()), grad, create_graph=self.double, allow_unused=True)
        found |= {f"d {name}": _or_zeros(d, leaf) for (name, leaf), d in zip(wanted.items(), firsts, strict=True)}
        if self.double:
            found |= self._seconds(found, {**wanted, "grad": grad}, seconds)
        return found

    def _seconds(self, found: Values, wanted: Values, seconds: Values) -> Values:
        graphs = [(found[name], seconds[name]) for name in found if name in seconds and found[name].requires_grad]
        if not graphs:
            return {}
        results, upstream = zip(*graphs, strict=True)
        grads = torch.autograd.grad(results, list(wanted.values()), upstream, allow_unused=True)
        return {f"dd {name}": _or_zeros(d, leaf) for (name, leaf), d in zip(wanted.items(), grads, strict=True)}

    def specified(self, order: int = 0) -> Callable[[Values], Tensor]:
        """The reference as a program; orders other than 0 shuffle elements on the way, so that sums run differently."""
        function = reference.residual_srelu if self.join else reference.srelu

        def call(operands: Values) -> Tensor:
            target = operands[self.target]
            there, back = _shuffles(target.shape, order)
            wide = torch.promote_types(target.dtype, next(iter(operands.values())).dtype)
            big = ("x", "shortcut", "branch")
            shuffled = [there(t.to(wide)) if name in big else t for name, t in operands.items()]
            if not self.writes:
                return back(function(*shuffled))
            return target.copy_(back(function(*(t.clone() for t in shuffled))))

        return call

    def ours(self) -> Callable[[Values], Tensor]:
        """The functional or the layer, of a batch or of its only element."""
        function = functional.residual_srelu if self.join else functional.srelu
        settings: dict[str, Any] = {"spatial_dims": len(self.shape) - 2} if self.named else {}
        layer = self._layer(settings) if self.layer else None

        def call(operands: Values) -> Tensor:
            full = operands[self.target].shape
            values = [t.squeeze(0) if self.unbatched and t.shape == full else t for t in operands.values()]
            if layer is None:
                output = function(*values, inplace=self.inplace, **settings)
            else:
                layer.__dict__["srelu_bias"] = operands["bias"]
                output = layer(*(t for name, t in zip(operands, values, strict=True) if name != "bias"))
            return output.unsqueeze(0) if self.unbatched else output

        return call

    def _layer(self, settings: dict[str, Any]) -> nn.Module:
        """The layer without its parameter: the operand takes its place."""
        layer = (ResidualSReLU if self.join else SReLU)(max(1, self.shape[1]), inplace=self.inplace, **settings)
        layer.__dict__["_parameters"] = {}
        return layer

    # The check

    def run(self) -> None:
        modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
        with modes.get(self.mode, nullcontext)():
            self._run()

    def _run(self) -> None:
        with torch.inference_mode() if self.mode == "inference tensors" else nullcontext():
            leaves = {name: leaf.clone().requires_grad_(name in self.needs) for name, leaf in self.leaves.items()}
            operands, base = self.operands(leaves)
        kept = {name: operand.detach().clone() for name, operand in operands.items()}
        whole = base.detach().clone()
        expected, names = self.expectation(operands, base)
        call = self.ours()
        if expected == "right" and self.case.flag("compiled", COMPILED_ODDS):
            self.double = False
            if self.layer and operands[self.target]._base is not None:
                self.writes = self.observe_base = False  # a compiled layer writes over no view
            torch._dynamo.reset()
            backends = ["aot_eager"] * 12
            if not any(
                t.is_neg() for t in operands.values()
            ):  # Inductor reads them without their sign, torch.relu's too
                backends.append("inductor")
            call = torch.compile(call, backend=self.case.choose("backend", backends))
        with torch.autocast("cpu", torch.bfloat16) if self.case.flag("autocast", 12) else nullcontext():
            output, error = attempt(lambda: call(operands))
        if error is not None or expected == "refused":
            if expected == "right":
                accepted(error, self._describe(operands))
            refused(error, names, self._describe(operands))
            same_bits("the base of a refused argument", base.detach(), whole)
            return
        self._check_operands(operands, kept, output)
        if self.writes:
            self._check_surroundings(operands[self.target], base, whole)
        self._check_values(base if self.observe_base else output, leaves)

    def _describe(self, operands: Values) -> str:
        return ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in operands.items())

    def _check_operands(self, operands: Values, kept: Values, output: Tensor) -> None:
        """What is only read keeps its bits; an in-place call returns what it has written."""
        target = operands[self.target]
        if output.dtype != self.dtype:
            raise Failure("wrong dtype", f"output is {output.dtype}, operands are {self.dtype}")
        for name, operand in operands.items():
            if not self.writes or (name != self.target and self.alias == "none"):
                same_bits(name, operand.detach(), kept[name])
        if self.writes:
            same_bits("the argument written over", target.detach(), output.detach())

    def _check_surroundings(self, target: Tensor, base: Tensor, before: Tensor) -> None:
        """Check that nothing changed in the base of a view except the view."""
        changed = base.detach().clone()
        if _shows(target, base):
            cells = _cells(target).flatten() - base.storage_offset()  # the base is dense
            changed.view(-1)[cells], before.view(-1)[cells] = 0, 0
        same_bits("what surrounds the argument written over", changed, before)

    def _check_values(self, output: Tensor, leaves: Values) -> None:
        exact = {name: leaf.detach().double() for name, leaf in self.leaves.items()}
        exact["bias"] = self.leaves["bias"].to(self.dtype).double()
        grad, seconds, doubtful = self._upstream(output, exact)
        found = self.derivatives(output, leaves, grad, seconds)
        wide = None if grad is None else grad.detach().double()
        expected = self.program(self.specified(), exact, wide, {n: t.double() for n, t in seconds.items()})
        plain: list[Values] = []

        def values(name: str) -> Iterator[Tensor]:
            for order in range(ORDERS):
                if order == len(plain):
                    plain.append(self.program(self.specified(order), self.leaves, grad, seconds))
                yield plain[order].get(name, torch.zeros(()))

        for name in {**found, **expected}:
            for one, other in ((found, expected), (expected, found)):
                if name not in one:  # it depends on nothing, so there is no graph
                    one[name] = torch.zeros_like(other[name])
            if name == "dd grad" and doubtful is not None:
                found[name], expected[name] = (t.masked_fill(doubtful, 0) for t in (found[name], expected[name]))
            if name.startswith("d ") and found[name].dtype != self.leaves[name[2:]].dtype:
                raise Failure("wrong dtype", f"{name} is {found[name].dtype}")
            absolute = self._of_channels(exact, wide) if name == "d bias" else 0.0
            accurate(name, found[name], expected[name], lambda name=name: values(name), absolute)

    def _of_channels(self, exact: Values, grad: Tensor | None) -> float:
        """Where one number is expanded to a bias, PyTorch adds up the channels' gradients, which may cancel. Ours are
        these gradients, each in the dtype of the bias: 1e-6 of each is allowed, as where the bias has C numbers."""
        if self.case.made["bias form"] != "expanded":
            return 0.0
        apart = exact | {"bias": exact["bias"].repeat(self.shape[1])}
        return (
            1e-6 * self.program(self.specified(), apart, grad, {})["d bias"].abs().nan_to_num(posinf=0.0).sum().item()
        )

    def _upstream(self, output: Tensor, exact: Values) -> tuple[Tensor | None, Values, Tensor | None]:
        """The gradient that arrives, those of the second backward, and where rounding decides which side was taken:
        there no gradient arrives."""
        if self.mode != "grad" or not output.requires_grad:
            return None, {}, None
        layout = tensors.layout(self.case, "gradient", tuple(output.shape)) if output.dim() > 1 else None
        leaf = tensors.values(self.kind, layout.shape if layout else tuple(output.shape), self.dtype)
        grad = layout.view(tensors.sprinkle(self.case, "gradient", leaf)) if layout else leaf
        doubtful = self._doubtful(exact, output)
        if doubtful is not None and doubtful.any():
            grad = grad.masked_fill(doubtful, 0) if _overlaps(grad) else grad.masked_fill_(doubtful, 0)
        seconds = {}
        if self.double:
            seconds = {
                f"d {n}": tensors.values(self.kind, tuple(self.leaves[n].shape), self.leaves[n].dtype)
                for n in self.needs
            }
        return grad, seconds, doubtful

    def _doubtful(self, exact: Values, output: Tensor) -> Tensor | None:
        if not self.join:
            return None
        with torch.no_grad():
            o, _ = self.operands(exact)
            scaled = o["branch"] * (o["scale"].reshape(()) if "scale" in o else 1.0)
            bias = o["bias"].reshape(-1, *[1] * (len(self.shape) - 2))
            distance = (o["shortcut"] + scaled - bias).abs()
            size = o["shortcut"].abs() + scaled.abs() + bias.abs()
            doubtful = (distance > 0) & (distance <= 4 * torch.finfo(self.dtype).eps * size)
            if not self.observe_base:
                return doubtful
            marks = {name: torch.zeros_like(leaf) for name, leaf in exact.items()}
            operands, base = self.operands(marks)
            operands[self.target].copy_(doubtful)
            return base.bool()


def _shuffles(shape: torch.Size, order: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A permutation of the batch and of the last dimension, and its inverse; the first order is as it is."""
    if order == 0:
        return (lambda t: t), (lambda t: t)
    generator = torch.Generator().manual_seed(order)
    dims = {0: torch.randperm(shape[0], generator=generator)}
    if len(shape) > 2:
        dims[len(shape) - 1] = torch.randperm(shape[-1], generator=generator)

    def shuffle(tensor: Tensor, inverse: bool = False) -> Tensor:
        for dim, permutation in dims.items():
            tensor = tensor.index_select(dim, permutation.argsort() if inverse else permutation)
        return tensor

    return shuffle, lambda t: shuffle(t, inverse=True)


def _shows(view: Tensor, base: Tensor) -> bool:
    """Whether they share memory; empty tensors share none."""
    return view.numel() > 0 and view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


def _cells(tensor: Tensor) -> Tensor:
    """The place of each element in the storage."""
    cells = torch.full((), tensor.storage_offset(), dtype=torch.int64)
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        cells = cells.unsqueeze(-1) + stride * torch.arange(size)
    return cells


def _overlaps(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and torch.unique(_cells(tensor)).numel() < tensor.numel()


def _or_zeros(derivative: Tensor | None, of: Tensor) -> Tensor:
    return torch.zeros_like(of) if derivative is None else derivative
