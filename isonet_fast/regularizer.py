"""One penalty for a whole network: `OrthoRegularizer`, from the modules of a model to what the ops compute."""

from __future__ import annotations

import math
import operator
import reprlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .backward_order import BackwardOrder, has_hooks
from .existence import isometry
from .geometry import Penalty, Precision, check_penalty
from .layers import (
    Filter,
    Types,
    has_values,
    is_transposed,
    layer_of,
    shape_of,
    unfit,
    weight_of,
)
from .layers import official_filter as official_filter  # part of this module's interface
from .ops import orthogonality
from .penalty_arguments import check_gradients, check_precision, checked_scale
from .problem import Problem
from .selection import Coeff, Selection
from .sharded import Shards, is_sharded, reshard
from .summary import Summary, SummaryRow, gflop

_WEIGHT = operator.itemgetter("weight")
Gathered = tuple[list[nn.Parameter], Problem, Shards | None]


class OrthoRegularizer:
    """sum over layers of coeff * penalty: `loss = criterion(model(x), y) + reg()`.

    It covers every Conv1d to Conv3d (subclasses too) and every OrthoLinear. A Parameter that several modules share
    counts once. Each call looks at the model again. So it finds layers that were replaced, added or removed, weights
    that FSDP, `load_state_dict(assign=True)` or averaging exchanged, and lazy layers that now have a shape. The
    penalty, stride, dilation and groups of a layer are fixed at the first call. `filter` and `coeff` are called once
    per layer.

    Left out with a warning: parametrized weights (reading one can advance a power iteration), subclasses whose own
    forward may compute another weight (weight standardisation), weights that are sparse, complex, quantised or of a
    foreign tensor class. A regularizer that finds nothing to penalise warns.

    Args:
        model: the network. With `work_group`, pass the DistributedDataParallel module, so that `no_sync` is noticed.
            With FSDP2, pass the network after `fully_shard`. In a detector, the default filter also takes the
            convolutions of the pyramid and the heads. Restrict it to the backbone with `filter=lambda name, module:
            name.startswith("backbone.body.") and official_filter(name, module)`. The detectors of `models.detection` do
            not need this: there, these convolutions have `penalty = None`. Any convolution with that attribute is left
            out.
        coeff: a finite number of at least 0, or `callable(name, module)` that gives one, asked once per layer.
        penalty: "isonet", "lorth" or "matrix" for every layer; None: each layer's own ("isonet" for plain
            convolutions).
        filter: `callable(name, module) -> bool`; None: `official_filter`, all but 7x7 kernels and three input channels.
        interval: k - 1 of k calls return 0, and the k-th returns k times the value. The counter is in the `state_dict`.
            `reg()` under no_grad (validation) is not counted and always returns the current value.
        work_group: a process group over which the work is split by (layer, offset); each rank's value and gradient are
            its share times the number of ranks, so that the averaging of data parallelism yields the exact full ones.
        precision: as for `functional.orthogonality_loss`.
        include: classes that are covered too: nn.Linear; nn.ConvTranspose1d to 3d, as the adjoint operator of the
            convolution whose weight it shares; a subclass with a forward of its own that computes with the weight
            itself.
        shard_group: the former name of `work_group`, deprecated.

    `last` is the unweighted penalty of the last computed call, detached, without synchronising the device (under
    `work_group`: of this rank's share; `last_total()` adds the shares); 0 before the first.

    FSDP2: `fully_shard` must shard every penalised weight over the same one-dimensional mesh. One all-gather assembles
    the float32 master weights. In every order of calls, `.grad` is then the mean of the ranks' other gradients plus the
    full gradient of the penalty. With `work_group`, each rank computes its share and one reduce-scatter adds the
    shares; the group must have the ranks of the mesh. Without it, each rank computes everything. All ranks must make
    the same calls, also of `summary()`. `reg()` adds its gradient to `.grad` at the end of the backward pass, so
    `torch.autograd.grad` does not see it.

    Raises TypeError or ValueError for an invalid argument. The first call raises ValueError for weights that are
    sharded in another way, and RuntimeError if `fully_shard` was called after the regularizer was made.

    Examples:
        >>> conv = isonet_fast.OrthoConv2d(4, 8, 3)
        >>> net = nn.Sequential(conv, isonet_fast.SReLU(8))
        >>> reg = isonet_fast.OrthoRegularizer(net, coeff=0.5)
        >>> conv.weight.data *= 2  # four singular values 2: 1/2 * 4 * (2^2 - 1)^2
        >>> loss = net(torch.zeros(1, 4, 8, 8)).mean() + reg()
        >>> loss.backward()
        >>> reg.last
        tensor(18.)
    """

    penalty: Penalty | None
    precision: Precision | None
    interval: int

    def __init__(
        self,
        model: nn.Module,
        coeff: Coeff = 1e-4,
        penalty: Penalty | None = None,
        filter: Filter | None = None,
        interval: int = 1,
        work_group: dist.ProcessGroup | None = None,
        precision: Precision | None = None,
        include: Types = (),
        *,
        shard_group: dist.ProcessGroup | None = None,
    ) -> None:
        if shard_group is not None:
            work_group = _renamed(shard_group, work_group)
        check_penalty(penalty, none="each layer's own")
        check_precision(precision)
        self.penalty, self.precision, self.interval = penalty, precision, _interval(interval)
        self._selection = Selection(model, coeff, penalty, filter, include)
        self._model, self._work_group = model, work_group
        self._calls = 0
        self._losses: Tensor | None = None
        self._sharded: dict[nn.Module, nn.Parameter] = {}
        self._problems: dict[tuple, tuple[Problem, Shards | None]] = {}
        self._seen: tuple[list[nn.Parameter], list[torch.Size]] = [], []
        self._gathered: Gathered | None = None
        self._order = BackwardOrder(model, shares=work_group is not None)
        self._share = (0, 1)
        if work_group is not None:
            self._share = _place_in(work_group)
        self._adopt()
        if work_group is not None:
            self._gather()  # so that the first backward pass is seen

    def _adopt(self) -> None:
        """Follow the weights of the selected layers from now on."""
        reshard(self._model)
        self._gathered = None
        self._holders = [chosen.module._parameters for chosen in self._selection.included.values()]
        for module, *_ in self._selection.included.values():
            if module not in self._sharded and is_sharded(module._parameters["weight"]):  # type: ignore[arg-type]
                self._keep_sharded(module)
                module.register_load_state_dict_post_hook(self._keep_sharded)  # assign=True exchanges the Parameter

    def _keep_sharded(self, module: nn.Module, *_: Any) -> None:
        self._sharded[module] = module._parameters["weight"]  # type: ignore[assignment]

    def _still_fits(self, module: nn.Module) -> bool:
        weight = weight_of(module)
        return weight is not None and (module in self._sharded or not unfit(weight))

    def _current(self, module: nn.Module) -> nn.Parameter:
        """The weight as it is now. Between forward and backward FSDP2 may have put a gathered copy in low precision in
        the place of the shard; then this is the shard."""
        weight = weight_of(module)
        assert weight is not None
        if is_sharded(weight) and module not in self._sharded:
            raise RuntimeError("OrthoRegularizer was made before fully_shard; make it afterwards")
        return weight if is_sharded(weight) else self._sharded.get(module, weight)

    def _gather(self) -> Gathered:
        """The weights as they are now, each Parameter once, what to compute for them, and how they are sharded.

        While the modules hold the same Parameters of the same shapes, the last answer is returned, because on a GPU the
        host's time per call counts.
        """
        if self._selection.changed():
            self._select()
        try:
            now = list(map(_WEIGHT, self._holders))
        except KeyError:  # parametrized since
            self._select()
            now = list(map(_WEIGHT, self._holders))
        known, shapes = self._seen
        same = len(now) == len(known) and all(map(operator.is_, now, known)) and list(map(Tensor.size, known)) == shapes
        if self._gathered is None or not same or len(set(map(Tensor.get_device, known))) > 1:
            self._gathered = self._look_up()
            known = [chosen.module._parameters["weight"] for chosen in self._selection.included.values()]  # type: ignore
            self._seen = known, list(map(Tensor.size, known))
        return self._gathered

    def _select(self) -> None:
        self._selection.look()
        self._adopt()

    def _look_up(self) -> Gathered:
        if not all(self._still_fits(chosen.module) for chosen in self._selection.included.values()):
            self._select()
        weights: dict[int, tuple[nn.Parameter, nn.Module, Penalty, float]] = {}
        for module, penalty, coeff in self._selection.included.values():
            weight = self._current(module)
            weights.setdefault(id(weight), (weight, module, penalty, coeff))
        now = [w for w, *_ in weights.values()]
        devices = sorted({str(w.device) for w in now})
        if len(devices) > 1:
            raise ValueError(
                f"OrthoRegularizer needs its weights on one device, they are on {', '.join(devices)}; "
                "make one for each device, with filter="
            )
        key = tuple((w.shape, is_sharded(w), *layer) for w, *layer in weights.values())
        if key not in self._problems:
            layers = tuple(layer_of(w, m, chosen) for w, m, chosen, _ in weights.values())
            scale = self.interval * self._share[1]
            coefficients = tuple(value * scale for *_, value in weights.values())
            problem = Problem(layers, coefficients, self.precision, self._share).unique
            self._problems = {key: (problem, Shards(now, self._work_group) if any(map(is_sharded, now)) else None)}
        self._order.watch([w for w in now if not is_sharded(w)])
        return now, *self._problems[key]

    def _due(self) -> bool:
        self._calls += 1
        return self._calls % self.interval == 0

    def _zero(self) -> Tensor:
        parameter = next(self._model.parameters(), None)
        return torch.zeros((), device=None if parameter is None else parameter.device)

    def __call__(self) -> Tensor:
        """sum of coeff * penalty, 0-dim, differentiable once.

        With gradient accumulation: if the loss is divided by the number of micro-batches, as Accelerate, Lightning and
        transformers do, add `reg()` to the loss of every micro-batch. If it is not divided, add `reg()` to one of them.
        Or leave `reg()` out, and call `accumulate_grad_()` once per optimizer step.

        Raises RuntimeError under FSDP2 if a weight has a hook of `register_post_accumulate_grad_hook`, because the hook
        would not see the penalty. Call `accumulate_grad_()` before the backward pass instead.
        """
        counts = torch.is_grad_enabled()
        if counts and not self._due():
            return self._zero().requires_grad_()  # so that reg().backward() works every time
        weights, problem, shards = self._gather()
        if shards is not None and counts and any(map(has_hooks, weights)):
            raise RuntimeError(
                "reg() under FSDP2 adds its gradient at the end of the backward pass, where hooks of "
                "register_post_accumulate_grad_hook (an optimizer in the backward pass) have run; call "
                "accumulate_grad_() before loss.backward() instead"
            )
        whole = shards.gather(weights) if shards else weights
        total, self._losses = orthogonality.loss(whole, problem)
        if not weights:
            return self._zero().requires_grad_(counts)
        return total if counts or self.interval == 1 else total / self.interval

    @torch.no_grad()
    def accumulate_grad_(self, grad_scale: float = 1.0) -> Tensor:
        """Add grad_scale * coeff * dpenalty/dW to every weight's `.grad`; returns sum of coeff * penalty.

        Call it once per optimizer step, after the gradients are unscaled (or with the scale as `grad_scale`) and before
        they are clipped. It is faster than `reg()` in the loss, because it adds directly to `.grad`. The order that is
        right everywhere: zero_grad(), accumulate_grad_(), loss.backward(), optimizer step.

        You may also call it after loss.backward(), with two exceptions. First, under DistributedDataParallel with
        `work_group`, call it before the backward pass that synchronises the gradients, because that pass must average
        the rank's share too. Second, if a weight has a hook of `register_post_accumulate_grad_hook` (an optimizer in
        the backward pass), call it between zero_grad() and loss.backward(). The hook uses what `.grad` holds at that
        moment. A warning appears if a hook did not see the penalty.

        Raises RuntimeError under DistributedDataParallel if it comes after the synchronising backward pass. Raises
        TypeError or ValueError for a `grad_scale` that is no finite real number, and for a `.grad` that is sparse, of
        no floating-point dtype, or has elements that share memory; no gradient has changed then.

        Examples:
            >>> net = nn.Sequential(isonet_fast.OrthoConv2d(4, 8, 3), isonet_fast.SReLU(8))
            >>> reg, optimizer = isonet_fast.OrthoRegularizer(net), torch.optim.SGD(net.parameters(), lr=0.1)
            >>> optimizer.zero_grad()
            >>> reg.accumulate_grad_()  # a delta is an isometry
            tensor(0.)
            >>> net(torch.ones(1, 4, 8, 8)).mean().backward()
            >>> optimizer.step()
        """
        scale = checked_scale(grad_scale)
        if not self._due():
            self._order.added([])
            return self._zero()
        weights, problem, shards = self._gather()
        if shards is not None:
            return self._accumulate_sharded(weights, problem, shards, scale)
        if weights and weights[0].is_meta:
            raise ValueError("accumulate_grad_() needs weights with values, got weights on the meta device")
        self._order.check(weights)
        total, self._losses = orthogonality.accumulate_grad_(weights, _grads(weights), problem, scale)
        self._order.added(weights)
        return total if weights else self._zero()

    def _accumulate_sharded(
        self, weights: list[nn.Parameter], problem: Problem, shards: Shards, grad_scale: float
    ) -> Tensor:
        whole = shards.gather(weights)
        grads = shards.zeros(whole[0])
        total, self._losses = orthogonality.accumulate_grad_(whole, shards.views(grads), problem, grad_scale)
        shards.add_(weights, grads)
        return total

    @property
    def last(self) -> Tensor:
        """The unweighted penalty of the last computed call; 0 before the first."""
        return self._zero() if self._losses is None else self._losses.sum()

    @property
    def computed(self) -> bool:
        """Whether a call has computed the penalty, so that `last` is its value."""
        return self._losses is not None

    @torch.no_grad()
    def last_total(self) -> Tensor:
        """`last` of all ranks together: the full unweighted penalty, by one all_reduce over `work_group`.

        Every rank of the group must call it. Nothing waits for the device. Without `work_group` it is `last`.

        Examples:
            >>> conv = isonet_fast.OrthoConv2d(4, 8, 3)
            >>> conv.weight.data *= 2
            >>> reg = isonet_fast.OrthoRegularizer(conv, coeff=0.5)
            >>> reg().item(), reg.last_total().item()
            (9.0, 18.0)
        """
        total = self.last
        if self._work_group is not None:
            dist.all_reduce(total, group=self._work_group)
        return total

    @torch.no_grad()
    def summary(self) -> Summary:
        """Every convolution, transposed convolution and linear layer: included or why not, its penalty (computed now;
        NaN on the meta device), what it costs, and how near to an isometry it can come (`existence.isometry`).

        Examples:
            >>> net = nn.Sequential(isonet_fast.OrthoConv2d(4, 8, 3), isonet_fast.SReLU(8), nn.Linear(8, 2))
            >>> for row in isonet_fast.OrthoRegularizer(net).summary():
            ...     print(row.name, row.shape, row.excluded or row.penalty)
            0 (8, 4, 3, 3) isonet
            2 (2, 8) linear, not in include
        """
        weights, problem, shards = self._gather()
        every_unit = Problem(problem.layers, problem.coefficients, problem.precision)
        whole = shards.gather(weights) if shards else weights
        losses = orthogonality.loss(whole, every_unit)[1] if weights else torch.zeros(0)
        values = losses.tolist() if has_values(losses) else [math.nan] * len(weights)
        computed = dict(zip(map(id, weights), zip(problem.layers, values, strict=True), strict=True))
        rows = {}
        for name, (module, penalty, coeff) in self._selection.included.items():
            weight = self._current(module)
            shape, possible = tuple(weight.shape), isometry(layer_of(weight, module, penalty), is_transposed(module))
            if id(weight) in computed:
                layer, value = computed.pop(id(weight))
                rows[name] = SummaryRow(name, shape, penalty, "", coeff, value, gflop(layer), possible)
            else:
                rows[name] = SummaryRow(name, shape, None, "shares its weight", 0.0, 0.0, 0.0, possible)
        for name, (module, why) in self._selection.excluded.items():
            rows[name] = SummaryRow(name, shape_of(module), None, why, 0.0, 0.0, 0.0)
        order = [name for name, _ in self._model.named_modules() if name in rows]
        return Summary(rows[name] for name in order)

    def state_dict(self) -> dict[str, int]:
        """The counter of `interval`: how many calls there were.

        Examples:
            >>> reg = isonet_fast.OrthoRegularizer(isonet_fast.OrthoConv2d(4, 8, 3), interval=4)
            >>> penalty = reg()
            >>> reg.state_dict()
            {'calls': 1}
        """
        return {"calls": self._calls}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on with the counter of a `state_dict`; ValueError for anything else.

        Examples:
            >>> reg = isonet_fast.OrthoRegularizer(isonet_fast.OrthoConv2d(4, 8, 3), interval=4)
            >>> reg.load_state_dict({"calls": 3})
            >>> reg.accumulate_grad_()  # the fourth call computes the penalty
            tensor(0.)
            >>> reg.computed
            True
        """
        calls = state.get("calls") if isinstance(state, Mapping) else None
        if not isinstance(calls, int) or isinstance(calls, bool) or calls < 0:
            raise ValueError(f'state must be what state_dict() returned, {{"calls": N}}, got {reprlib.repr(state)}')
        self._calls = calls


def _grads(weights: list[nn.Parameter]) -> list[Tensor]:
    """Every weight's `.grad`, made where there is none. A frozen weight counts only in the value. Its gradient goes to
    a buffer that nobody sees, and a `.grad` from before it was frozen stays as it is."""
    grads = [weight.grad if weight.requires_grad else None for weight in weights]
    if any(grad is None for grad in grads):
        check_gradients(grad for grad in grads if grad is not None)  # before any is made
        for n, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
            if grad is None:
                grads[n] = torch.zeros_like(weight)
                if weight.requires_grad:
                    weight.grad = grads[n]
    return grads  # type: ignore[return-value]


def _renamed(old: dist.ProcessGroup, new: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if new is not None:
        raise TypeError("work_group and shard_group are one argument under two names, got both; give only work_group")
    warnings.warn("shard_group is now called work_group", DeprecationWarning, stacklevel=3)
    return old


def _place_in(group: Any) -> tuple[int, int]:
    """This process's rank in the group, and how many there are."""
    try:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    except Exception as error:
        raise ValueError(
            f"work_group must be a process group of torch.distributed, after init_process_group, got "
            f"{type(group).__name__}: {error}"
        ) from error
    if rank < 0:
        raise ValueError("work_group must be a process group that this process belongs to")
    return rank, ranks


def _interval(value: Any) -> int:
    """An integer of any kind."""
    try:
        interval = 0 if isinstance(value, bool) else operator.index(value)
    except Exception:
        interval = 0
    if interval < 1:
        raise ValueError(f"interval must be a positive int, got {value!r}")
    return interval
