"""Which layers of a network are penalised and with which coefficient, found again when the network changes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .geometry import Penalty
from .layers import (
    ADJOINT,
    LAZY,
    LINEAR,
    NONE,
    PARAMETRIZED,
    QUANTISED,
    WEIGHT,
    Filter,
    Types,
    absent,
    is_layer,
    official_filter,
    overridden,
    own_penalty,
    types,
    unfit,
    warn,
    weight_of,
)

Coeff = float | Callable[[str, nn.Module], float]
FILTER = "filter"
UNASKED = (FILTER, LINEAR, ADJOINT, NONE, LAZY, QUANTISED)  # a layer left out for another reason is worth a warning


class Chosen(NamedTuple):
    """A layer that is penalised."""

    module: nn.Module
    penalty: Penalty
    coeff: float


class Selection:
    """The layers of `model`, by name: `included`, and `excluded` with the reason. Arguments: as for OrthoRegularizer.

    `filter` and `coeff` are asked once for each layer, and never about a parametrized one.
    """

    model: nn.Module
    penalty: Penalty | None
    include: tuple[type[nn.Module], ...]
    filter: Callable[[str, nn.Module], Any]
    coeff: float | Callable[[str, nn.Module], Any]

    def __init__(self, model: nn.Module, coeff: Coeff, penalty: Penalty | None, filter: Filter | None, include: Types):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model, self.penalty, self.include = model, penalty, types(include)
        self.filter = official_filter if filter is None else _asked_of_layers("filter", filter, " or None")
        self.coeff = _asked_of_layers("coeff", coeff) if callable(coeff) else coefficient(coeff)
        self.included: dict[str, Chosen] = {}
        self.excluded: dict[str, tuple[nn.Module, str]] = {}
        self._answers: dict[nn.Module, float | None] = {}  # the coefficient; None where the filter says no
        self.look()

    def changed(self) -> bool:
        """Whether a module was replaced, added or removed since `look()`, or one that had no usable weight has one now.

        Every call of the regularizer asks this. So it only compares what the modules hold, and visits no module.
        """
        return self._children != self._known or any(
            type(module) is not kind or weight_of(module) is not weight for module, kind, weight in self._waiting
        )

    def look(self) -> None:
        """Go through the model anew."""
        before = dict(self.excluded.values())
        had, self.included, self.excluded = bool(self.included) or not before, {}, {}
        for name, module in self.model.named_modules():
            if is_layer(module):
                why = self._why_not(name, module)
                if why:
                    self.excluded[name] = module, why
                else:
                    coeff = self._answers[module]
                    assert coeff is not None
                    self.included[name] = Chosen(module, self.penalty or own_penalty(module) or "isonet", coeff)
        self._children = [module._modules for module in self.model.modules()]
        self._known = [dict(children) for children in self._children]
        self._waiting = [
            (module, type(module), weight_of(module))
            for module, why in self.excluded.values()
            if why in (PARAMETRIZED, LAZY) or why.endswith(WEIGHT)
        ]
        listed = {module for module, *_ in (*self.included.values(), *self.excluded.values())}
        self._answers = {module: answer for module, answer in self._answers.items() if module in listed}
        self._warn(before, had)

    def _why_not(self, name: str, module: nn.Module) -> str:
        why = absent(module, self.include)
        if why:
            return why
        if module not in self._answers:
            self._answers[module] = self._ask(name, module)
        if self._answers[module] is None:
            return FILTER
        weight = weight_of(module)
        assert weight is not None
        return unfit(weight) or overridden(module, self.include)

    def _ask(self, name: str, module: nn.Module) -> float | None:
        answer = _answer("filter", self.filter, name, module)
        try:
            wanted = bool(answer)
        except Exception as error:
            raise TypeError(f"filter must return True or False, got a {type(answer).__name__} for {name!r}") from error
        if not wanted:
            return None
        return coefficient(_answer("coeff", self.coeff, name, module), name) if callable(self.coeff) else self.coeff

    def _warn(self, before: Mapping[nn.Module, str], had: bool) -> None:
        left = _by_reason(
            (name, why)
            for name, (module, why) in self.excluded.items()
            if why not in UNASKED and before.get(module) != why
        )
        for why, names in left.items():
            warn(f"OrthoRegularizer leaves out {_listed(names)}: {why}")
        reasons = _by_reason((name, why) for name, (_, why) in self.excluded.items())
        if not self.included and had and LAZY not in reasons:
            asked = getattr(self.filter, "__qualname__", type(self.filter).__name__)
            told = [f"{_listed(n)} ({f'filter {asked}' if why == FILTER else why})" for why, n in reasons.items()]
            found = f"it leaves out {'; '.join(told)}" if told else "the model has no convolution or linear layer"
            warn(f"OrthoRegularizer has nothing to penalise: {found}")


def coefficient(value: Any, name: str | None = None) -> float:
    """A number of any kind as a float: finite, at least 0."""
    where = "" if name is None else f" for {name!r}"
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except OverflowError:
        number = math.inf
    except Exception as error:
        raise TypeError(f"coeff must be a number or give one for each layer, got {value!r}{where}") from error
    if not 0 <= number < math.inf:
        raise ValueError(f"coeff must be finite and at least 0, got {number}{where}")
    return number


def _asked_of_layers(argument: str, function: Any, alternative: str = "") -> Callable[[str, nn.Module], Any]:
    if not callable(function):
        raise TypeError(f"{argument} must be callable(name, module){alternative}, got {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin may have none
        return function
    try:
        signature.bind("name", nn.Identity())
    except TypeError as error:
        raise TypeError(
            f"{argument} must take two arguments, (name, module), got one that takes {signature}"
        ) from error
    return function


def _answer(argument: str, function: Callable[[str, nn.Module], Any], name: str, module: nn.Module) -> Any:
    try:
        return function(name, module)
    except Exception as error:
        error.add_note(f"raised by {argument}= of OrthoRegularizer, asked about {name!r}, a {type(module).__name__}")
        raise


def _by_reason(layers: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, why in layers:
        reasons.setdefault(why, []).append(name)
    return reasons


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) if name else "the model itself" for name in names[:most]) + more
