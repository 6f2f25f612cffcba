"""One penalty for a whole network, and the optimizer's parameter groups of the official recipe."""

from __future__ import annotations

import operator
import reprlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .geometry import PENALTIES, Layer
from .nn import OrthoLinear, SharedScale
from .nn.conv import _Orthogonal
from .ops import orthogonality
from .penalty_arguments import check_gradients, check_precision, checked_layer, checked_scale
from .sharded import Shards, is_sharded, reshard

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Filter = Callable[[str, nn.Module], bool]


class Row(NamedTuple):
    """One layer in `OrthoRegularizer.summary()`."""

    name: str
    shape: tuple[int, ...]
    penalty: str | None  # which one; None if excluded
    excluded: str  # why it is excluded; empty if it is not
    coeff: float
    value: float  # unweighted
    gflop: float  # multiply-adds of the penalty and its gradient, times two


class Summary(list[Row]):
    """The rows of `OrthoRegularizer.summary()`; prints as a table."""

    def __str__(self) -> str:
        lines = [f"{'layer':<28} {'weight':<22} {'penalty':<8} {'coeff':>9} {'value':>11} {'GFLOP':>9}"]
        for row in self:
            shape = "x".join(map(str, row.shape))
            if row.excluded:
                lines.append(f"{row.name:<28} {shape:<22} excluded: {row.excluded}")
            else:
                numbers = f"{row.coeff:>9.2g} {row.value:>11.5g} {row.gflop:>9.4f}"
                lines.append(f"{row.name:<28} {shape:<22} {row.penalty:<8} {numbers}")
        total = sum(row.value for row in self), sum(row.gflop for row in self)
        return "\n".join([*lines, f"{'total':<28} {'':<22} {'':<8} {'':>9} {total[0]:>11.5g} {total[1]:>9.4f}"])


class OrthoRegularizer:
    """sum over layers of coeff * penalty: `loss = criterion(model(x), y) + reg()`.

    Covers every Conv1d to Conv3d (subclasses too, transposed ones never) and OrthoLinear; each Parameter once, however
    many modules share it. Weights are looked up at each call, so FSDP, `load_state_dict(assign=True)` and swapped
    (EMA) weights are seen; stride, dilation and groups are those of the first call. Parametrized weights are left out
    with a warning: reading one can advance a power iteration.

    model: the network; with `shard_group` the DistributedDataParallel module, so that `no_sync` is noticed. Under FSDP2
        the network after `fully_shard`.
    coeff: a float, or `callable(name, module) -> float` asked once per layer.
    penalty: "isonet", "lorth" or "matrix" for every layer; None: each layer's own ("isonet" for plain convolutions).
    filter: `callable(name, module) -> bool`; None: the official rule, all but 7x7 kernels and three input channels.
    interval: k - 1 of k calls return 0 and the k-th is multiplied by k; the counter is in the `state_dict`.
    shard_group: a process group over which the work is split by (layer, offset); each rank's value and gradient are
        its share times the number of ranks, so that the averaging of data parallelism yields the exact full ones.
    precision: as for `functional.orthogonality_loss`.

    `last` is the unweighted penalty of the last computed call, detached, without synchronising the device (under
    `shard_group`: of this rank's share; `last_total()` adds the shares).

    FSDP2 (`fully_shard`: every penalised weight, over one one-dimensional mesh). One all-gather makes the float32
    masters whole; `.grad` receives the whole penalty's gradient beside the mean of the ranks' other gradients, in every
    order of calls. With `shard_group`, which must have the mesh's ranks, each computes its share and one reduce-scatter
    adds them; without it each computes everything. Every rank must make the same calls, `summary()` too. The autograd
    form adds to `.grad` at the end of the backward pass, so that `torch.autograd.grad` does not see it.

    Raises at the first call ValueError for weights sharded otherwise, and RuntimeError if `fully_shard` came later.
    """

    def __init__(
        self,
        model: nn.Module,
        coeff: float | Callable[[str, nn.Module], float] = 1e-4,
        penalty: str | None = None,
        filter: Filter | None = None,
        interval: int = 1,
        shard_group: Any = None,
        precision: str | None = None,
    ) -> None:
        if penalty is not None and penalty not in PENALTIES:
            raise ValueError(f"penalty must be one of {PENALTIES} or None (each layer's own), got {penalty!r}")
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be a positive int, got {interval!r}")
        if filter is not None and not callable(filter):
            raise TypeError(f"filter must be callable(name, module) or None, got {type(filter).__name__}")
        check_precision(precision)
        self.penalty, self.precision, self.interval = penalty, precision, interval
        self._model, self._shard_group = model, shard_group
        self._calls = 0
        self._losses: Tensor | None = None
        self._excluded: dict[str, tuple[nn.Module, str]] = {}
        self._included: dict[str, tuple[nn.Module, str, float]] = {}
        self._sharded: dict[nn.Module, nn.Parameter] = {}
        self._problems: dict[tuple, tuple[orthogonality.Problem, Shards | None]] = {}
        self._seen: tuple[list[nn.Parameter], list[torch.Size]] = [], []
        self._gathered: tuple[list[nn.Parameter], orthogonality.Problem, Shards | None] | None = None
        reshard(model)
        for name, module in model.named_modules():
            if isinstance(module, (*_CONVOLUTIONS, OrthoLinear)):
                self._consider(name, module, coeff, filter or official_filter)
        self._shard = (0, 1)
        if shard_group is not None:
            self._shard = (dist.get_rank(shard_group), dist.get_world_size(shard_group))
            self._watch_backward()

    def _consider(self, name: str, module: nn.Module, coeff: Any, filter: Filter) -> None:
        own = module.penalty if isinstance(module, _Orthogonal) else "isonet"
        if _weight(module) is None:
            self._leave_out_parametrized(name, module)
        elif own is None:
            self._excluded[name] = module, "penalty=None"
        elif not filter(name, module):
            self._excluded[name] = module, "filter"
        else:
            value = coeff(name, module) if callable(coeff) else coeff
            if not isinstance(value, (int, float)):
                raise TypeError(f"coeff must be a float or give one for each layer, got {value!r} for {name!r}")
            self._included[name] = module, self.penalty or own, float(value)
            if is_sharded(module._parameters["weight"]):  # type: ignore[arg-type]
                self._keep_sharded(module)
                module.register_load_state_dict_post_hook(self._keep_sharded)  # assign=True exchanges the Parameter

    def _leave_out_parametrized(self, name: str, module: nn.Module) -> None:
        warnings.warn(f"OrthoRegularizer leaves out {name!r}: its weight is parametrized", stacklevel=4)
        self._excluded[name] = module, "parametrized"

    def _keep_sharded(self, module: nn.Module, *_: Any) -> None:
        self._sharded[module] = module._parameters["weight"]  # type: ignore[assignment]

    def _current(self, module: nn.Module) -> nn.Parameter | None:
        """The weight as it is now. Between forward and backward FSDP2 may have a gathered copy in a shard's place, in
        low precision; then the shard."""
        weight = _weight(module)
        if weight is None:
            return None
        if is_sharded(weight) and module not in self._sharded:
            raise RuntimeError("OrthoRegularizer was made before fully_shard; make it afterwards")
        return weight if is_sharded(weight) else self._sharded.get(module, weight)

    def _gather(self) -> tuple[list[nn.Parameter], orthogonality.Problem, Shards | None]:
        """The weights as they are now, each Parameter once, what to compute for them, and how they are sharded.

        While the modules hold the same Parameters of the same shapes, the answer of last time: on a GPU the host's time
        per call counts.
        """
        now = [module._parameters.get("weight") for module, _, _ in self._included.values()]
        known, shapes = self._seen
        same = len(now) == len(known) and all(map(operator.is_, now, known)) and [w.shape for w in known] == shapes
        if self._gathered is None or not same or len(set(map(Tensor.get_device, known))) > 1:
            self._gathered = self._look_up()  # leaves out what is parametrized since: None here
            known = [weight for weight in now if weight is not None]
            self._seen = known, [w.shape for w in known]
        return self._gathered

    def _look_up(self) -> tuple[list[nn.Parameter], orthogonality.Problem, Shards | None]:
        weights: dict[int, tuple[nn.Parameter, nn.Module, str, float]] = {}
        for name, (module, chosen, value) in list(self._included.items()):
            weight = self._current(module)
            if weight is None:  # parametrized since
                self._leave_out_parametrized(name, module)
                del self._included[name]
            else:
                weights.setdefault(id(weight), (weight, module, chosen, value))
        now = [w for w, *_ in weights.values()]
        devices = sorted({str(w.device) for w in now})
        if len(devices) > 1:
            raise ValueError(
                f"OrthoRegularizer needs its weights on one device, they are on {', '.join(devices)}; "
                "make one for each device, with filter="
            )
        key = tuple((w.shape, m, is_sharded(w)) for w, m, *_ in weights.values())
        if key not in self._problems:
            layers = tuple(_layer(w, m, chosen) for w, m, chosen, _ in weights.values())
            scale = self.interval * self._shard[1]
            coefficients = tuple(value * scale for *_, value in weights.values())
            problem = orthogonality.Problem(layers, coefficients, self.precision, self._shard)
            self._problems = {key: (problem, Shards(now, self._shard_group) if any(map(is_sharded, now)) else None)}
        return now, *self._problems[key]

    def _due(self) -> bool:
        self._calls += 1
        return self._calls % self.interval == 0

    def _zero(self) -> Tensor:
        parameter = next(self._model.parameters(), None)
        return torch.zeros((), device=None if parameter is None else parameter.device)

    def __call__(self) -> Tensor:
        """sum of coeff * penalty, 0-dim, differentiable once. Under gradient accumulation add it to the last
        micro-batch's loss only."""
        if self._due():
            weights, problem, shards = self._gather()
            whole = shards.gather(weights) if shards else weights
            total, self._losses = orthogonality.loss(whole, problem)
            if weights:
                return total
        return self._zero().requires_grad_(torch.is_grad_enabled())  # so that reg().backward() works every time

    @torch.no_grad()
    def accumulate_grad_(self, grad_scale: float = 1.0) -> Tensor:
        """Add grad_scale * coeff * dpenalty/dW to every weight's `.grad`; returns sum of coeff * penalty.

        Once per optimizer step, after the gradients are unscaled (or with the scale as `grad_scale`) and before they
        are clipped. Saves the autograd engine's addition per weight. Under DistributedDataParallel with `shard_group`
        it must come before the backward that synchronises the gradients: its share has to be averaged with them. Under
        FSDP2 it may come before or after.

        Raises RuntimeError under DistributedDataParallel where it comes after that backward. Raises TypeError or
        ValueError for a `grad_scale` that is no finite real number, and for a `.grad` that is sparse, of no
        floating-point dtype, or has elements that share memory; no gradient has changed then.
        """
        scale = checked_scale(grad_scale)
        if not self._due():
            return self._zero()
        weights, problem, shards = self._gather()
        if shards is not None:
            return self._accumulate_sharded(weights, problem, shards, scale)
        if self._shard_group is not None:
            self._check_order(weights)
        total, self._losses = orthogonality.accumulate_grad_(weights, _grads(weights), problem, scale)
        return total if weights else self._zero()

    def _accumulate_sharded(
        self, weights: list[nn.Parameter], problem: orthogonality.Problem, shards: Shards, grad_scale: float
    ) -> Tensor:
        whole = shards.gather(weights)
        grads = shards.zeros(whole[0])
        total, self._losses = orthogonality.accumulate_grad_(whole, shards.views(grads), problem, grad_scale)
        shards.add_(weights, grads)
        return total

    def _watch_backward(self) -> None:
        """Note for each weight at which version a synchronising backward has run over it."""
        self._synchronised: dict[int, int] = {}

        def note(weight: Tensor) -> None:
            if getattr(self._model, "require_backward_grad_sync", True):
                self._synchronised[id(weight)] = weight._version
            else:  # one that synchronises is still to come
                self._synchronised.pop(id(weight), None)

        for weight in self._gather()[0]:
            if weight.requires_grad and not is_sharded(weight):
                weight.register_post_accumulate_grad_hook(note)

    def _check_order(self, weights: list[nn.Parameter]) -> None:
        """A gradient of an earlier step does not count: an optimizer step changes the weight's version.

        A fused optimizer does not, and a gradient scaler may leave the step out. Then cleared gradients tell, and only
        then is the device asked for a value.
        """
        stale = [w.grad for w in weights if w.grad is not None and self._synchronised.get(id(w)) == w._version]
        if stale and torch.stack([grad.any() for grad in stale]).any():
            raise RuntimeError(
                "accumulate_grad_() with shard_group must come before the backward that synchronises the gradients, "
                "but a backward has already run since the gradients were cleared; call it before loss.backward() "
                "(under gradient accumulation: before the last one, and give the regularizer the "
                "DistributedDataParallel module, so that no_sync() is noticed)"
            )

    @property
    def last(self) -> Tensor | None:
        """The unweighted penalty of the last computed call; None before the first."""
        return None if self._losses is None else self._losses.sum()

    @torch.no_grad()
    def last_total(self) -> Tensor | None:
        """`last` of all ranks together: the full unweighted penalty, by one all_reduce over `shard_group`.

        Every rank of the group must call it. Nothing waits for the device. Without `shard_group` it is `last`.
        """
        total = self.last
        if total is not None and self._shard_group is not None:
            dist.all_reduce(total, group=self._shard_group)
        return total

    @torch.no_grad()
    def summary(self) -> Summary:
        """Every convolution and OrthoLinear: included or why not, its penalty (computed now) and its cost."""
        weights, problem, shards = self._gather()
        every_unit = orthogonality.Problem(problem.layers, problem.coefficients, problem.precision)
        whole = shards.gather(weights) if shards else weights
        values = orthogonality.loss(whole, every_unit)[1].tolist() if weights else []
        computed = dict(zip(map(id, weights), zip(problem.layers, values, strict=True), strict=True))
        rows = {}
        for name, (module, chosen, coeff) in self._included.items():
            weight = self._current(module)
            assert weight is not None
            if id(weight) in computed:
                geometry, value = computed.pop(id(weight))
                rows[name] = Row(name, tuple(weight.shape), chosen, "", coeff, value, _gflop(geometry))
            else:
                rows[name] = Row(name, tuple(weight.shape), None, "shares its weight", 0.0, 0.0, 0.0)
        for name, (module, why) in self._excluded.items():
            parameter = _weight(module)
            rows[name] = Row(name, () if parameter is None else tuple(parameter.shape), None, why, 0.0, 0.0, 0.0)
        order = [name for name, _ in self._model.named_modules() if name in rows]
        return Summary(rows[name] for name in order)

    def state_dict(self) -> dict[str, int]:
        return {"calls": self._calls}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on with the counter of a `state_dict`; ValueError for anything else."""
        calls = state.get("calls") if isinstance(state, Mapping) else None
        if not isinstance(calls, int) or isinstance(calls, bool) or calls < 0:
            raise ValueError(f'state must be what state_dict() returned, {{"calls": N}}, got {reprlib.repr(state)}')
        self._calls = calls


def official_filter(name: str, module: nn.Module) -> bool:
    """What the official network penalises: not a 7x7 kernel, not three input channels."""
    return getattr(module, "kernel_size", None) != (7, 7) and (
        not isinstance(module, _CONVOLUTIONS) or module.weight.shape[1] != 3
    )


def _weight(module: nn.Module) -> nn.Parameter | None:
    """The Parameter itself, None where it is parametrized; never computed, as `module.weight` might be."""
    return module._parameters.get("weight")


def _grads(weights: list[nn.Parameter]) -> list[Tensor]:
    """Every weight's `.grad`, made where there is none. A frozen weight counts in the value alone: it gets a gradient
    that nobody sees, and one from before it was frozen is not touched."""
    grads = [weight.grad if weight.requires_grad else None for weight in weights]
    if not any(grad is None for grad in grads):
        check_gradients(weights, grads)  # type: ignore[arg-type]
        return grads  # type: ignore[return-value]
    check_gradients(*_both(weights, grads))  # all that there are, before any is made
    for n, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        if grad is None:
            grads[n] = torch.zeros_like(weight)
            if weight.requires_grad:
                weight.grad = grads[n]
    return grads  # type: ignore[return-value]


def _both(weights: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """The weights that have a gradient, and the gradients."""
    known = [(weight, grad) for weight, grad in zip(weights, grads, strict=True) if grad is not None]
    return [weight for weight, _ in known], [grad for _, grad in known]


def _layer(weight: Tensor, module: nn.Module, penalty: str) -> Layer:
    if isinstance(module, nn.Linear):
        return checked_layer(weight, 1, 1, 1, penalty)
    return checked_layer(weight, module.stride, module.dilation, module.groups, penalty)


def _gflop(geometry: Layer) -> float:
    """Gram of each offset of the half plane, and the two gradient products (one at t = 0)."""
    return sum(geometry.gram_flops(t) * (3 if any(t) else 2) for t in geometry.offsets) / 1e9


def param_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The official optimizer groups: SReLU biases without weight decay, shared scales at lr / 10 (with decay).

    Every parameter is in exactly one group; each group has its `lr` and `weight_decay`, and a schedule that
    multiplies learning rates keeps the ratio.
    """
    scales = {id(m.scale) for m in model.modules() if isinstance(m, SharedScale)}
    srelu: list[nn.Parameter] = []
    shared: list[nn.Parameter] = []
    other: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] == "srelu_bias":
            srelu.append(parameter)
        else:
            (shared if id(parameter) in scales or ".shared_scalar." in f".{name}" else other).append(parameter)
    groups = [
        {"params": other, "lr": lr, "weight_decay": weight_decay},
        {"params": srelu, "lr": lr, "weight_decay": 0.0},
        {"params": shared, "lr": lr / 10, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]
