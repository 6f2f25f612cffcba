"""The configuration of a training run: dataclasses, filled from a YAML preset, `--set` and the command line.

Every key is known and typed; anything else is refused with the nearest known name. A configuration holds values and
runs nothing (`plain_yaml`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from operator import attrgetter
from typing import Any, ClassVar, TypeVar

from ..geometry import PENALTIES
from . import plain_yaml
from .paths import user_path

C = TypeVar("C")  # Config, or another dataclass with the folder of its PRESETS
PRECISIONS = ("float32", "bfloat16", "float16")
_NOT_NEGATIVE = (
    "data.workers",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "schedule.warmup",
    "schedule.gamma",
    "penalty.coeff",
    "checkpoint.every_steps",
    "checkpoint.keep_every_epochs",
    "seed",
)
_AT_MOST = {
    "model.depth": 100_000,
    "model.width": 2**16,
    "data.image_size": 2**16,
    "seed": 2**40,  # the data and their order are seeded with about a million times this, in 64 bits
}


@dataclass
class Model:
    name: str = "isonet50"  # one of isonet_fast.models
    dropout: float | None = None  # None: as published; none in isonet_cifar
    depth: int = 32  # isonet_cifar only, as are the next two
    residual: bool = False
    width: int = 16
    activation: str = "srelu"  # from here on the switches of `models.ingredients`
    bias_init: float = -1.0
    bias_learned: bool = True
    initialisation: str = "delta"
    normalisation: str = "none"
    branch_scale: float | str | None = "published"
    fixup: bool = False


@dataclass
class Data:
    source: str = ""  # imagefolder:DIR, cifar10:DIR, cifar100:DIR, digits[:SIZE], synthetic[:IMAGES]
    batch_size: int = 128
    eval_batch_size: int = 200
    image_size: int = 224  # imagefolder and synthetic
    workers: int = 8
    strict: bool = False  # a corrupt image is an error instead of being skipped
    mixup: float = 0.0  # alpha of `mixup`'s Beta distribution; 0: images are not mixed


@dataclass
class Optimizer:
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float | None = None  # largest norm of the whole gradient


@dataclass
class Schedule:
    epochs: int = 100
    warmup: int = 5  # epochs, lr * epoch / warmup
    milestones: list[int] = field(default_factory=lambda: [30, 60, 90])  # x gamma after each
    gamma: float = 0.1


@dataclass
class Penalty:
    coeff: float = 1e-4
    kind: str = "isonet"  # or lorth, matrix
    interval: int = 1


@dataclass
class Checkpoint:
    every_steps: int = 0  # besides the end of each epoch
    keep_every_epochs: int = 0  # epoch-N.pt, never deleted


@dataclass
class Config:
    PRESETS: ClassVar[str] = "configs"  # their folder

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    penalty: Penalty = field(default_factory=Penalty)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    accumulate: int = 1  # batches per optimizer step, on each process
    fsdp: bool = False  # where there are several processes: shard the weights instead of copying them (DDP)
    precision: str = "float32"  # of autocast
    channels_last: bool = False
    compile: bool = False
    seed: int = 0
    device: str = "auto"  # cuda where there is one

    def __post_init__(self) -> None:
        _check(self)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def presets(kind: Any = Config) -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _presets(kind).iterdir() if f.name.endswith(".yaml"))


def load(preset: str | None, settings: Sequence[str] = (), base: Mapping[str, Any] | None = None) -> Config:
    """A configuration: defaults, then `base` (a checkpoint's), then a preset or YAML file, then `a.b=value` settings.

    A value is YAML. Where the key holds text, as data.source does, it is taken literally, unless it is in quotes.

    Raises ValueError for an unknown preset, an unknown key (naming the nearest known one), a value of the wrong type or
    out of range.
    """
    return load_as(Config, preset, settings, base)


def load_as(
    kind: type[C], preset: str | None, settings: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> C:
    """`load` for a dataclass of this kind."""
    values: dict[str, Any] = {}
    if base is not None:
        _merge(values, base, "the configuration in the checkpoint")
    if preset is not None:
        _merge(values, _read(preset, kind), preset)
    for setting in settings:
        _merge(values, _setting(setting, kind), setting)
    return _build(kind, values, "")


def _presets(kind: Any) -> Any:
    return resources.files(__package__) / kind.PRESETS


def _read(preset: str, kind: Any) -> Any:
    known = presets(kind)
    if preset in known:
        return plain_yaml.parse((_presets(kind) / f"{preset}.yaml").read_text(encoding="utf-8"), preset)
    path = user_path(preset)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return plain_yaml.read(path)
    raise ValueError(f"unknown preset {preset!r}{_nearest(preset, known)}; a path must end in .yaml")


def _setting(setting: str, kind: Any) -> dict[str, Any]:
    """`a.b=value` as {a: {b: value}}."""
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise ValueError(f"a setting is KEY=VALUE, for example optimizer.lr=0.02; got {setting!r}")
    parts, text = key.strip().split("."), text.lstrip()
    literal = _hint(parts, kind) is str and text[:1] not in ("'", '"')
    value: Any = text if literal else plain_yaml.parse(text, f"--set {setting}")
    for part in reversed(parts):
        value = {part: value}
    return value


def _hint(parts: Sequence[str], kind: Any) -> Any:
    """The type of a key's value; None for an unknown key."""
    hint: Any = kind
    for part in parts:
        hint = _hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    return hint


def _merge(into: dict[str, Any], values: Any, where: str) -> None:
    """Merge section by section, and no deeper: `_value` refuses deeper values, which may have no end."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must hold a mapping of sections, got {_short(values)}")
    for key, value in values.items():
        if isinstance(value, Mapping):
            section = into.get(key)
            into[key] = {**(section if isinstance(section, Mapping) else {}), **value}
        else:
            into[key] = value


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, class variables apart."""
    hints = typing.get_type_hints(kind)
    return {one.name: hints[one.name] for one in dataclasses.fields(kind)}


def _build(cls: Any, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where.rstrip('.')} is a section of keys, got {_short(values)}")
    hints = _hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"unknown key {where}{key}{_nearest(key, _known(where, hints))}")
        hint = hints[key]
        name = f"{where}{key}"
        arguments[key] = (
            _build(hint, value, f"{name}.") if dataclasses.is_dataclass(hint) else _value(hint, value, name)
        )
    return cls(**arguments)


def _known(where: str, hints: Mapping[str, Any]) -> list[str]:
    """The keys of this section; at the top also those one level down, because `lr` means `optimizer.lr`."""
    if where:
        return list(hints)
    return [
        *hints,
        *(f"{key}.{inner}" for key, hint in hints.items() if dataclasses.is_dataclass(hint) for inner in _hints(hint)),
    ]


def _value(hint: Any, value: Any, name: str) -> Any:
    """The value as its type; YAML reads 1e-4 as text, and 1 is a fine float."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    kind = allowed[0]
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            if isinstance(value, str) and str in allowed:
                return value
    elif typing.get_origin(kind) is list:
        inner = typing.get_args(kind)[0]
        if isinstance(value, list):
            return [_value(inner, item, f"{name}[{n}]") for n, item in enumerate(value)]
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        if kind is int and value > _AT_MOST.get(name, 2**48):
            raise ValueError(f"{name} must be at most {_AT_MOST.get(name, 2**48)}, got {_short(value)}")
        return value
    kinds = [k for k in allowed if k is not type(None)]
    expected = [getattr(k, "__name__", str(k)) if typing.get_origin(k) is None else str(k) for k in kinds]
    expected += ["null"] * (type(None) in allowed)
    raise ValueError(f"{name} must be {' or '.join(expected)}, got {_short(value)}")


def _short(value: Any) -> str:
    """The representation of a value; if it is long or endless, its beginning."""
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxlong = shortened.maxother = 80
    return shortened.repr(value)


def _check(config: Config) -> None:
    """Check ranges; types have been checked before."""
    check(
        config,
        positive=("data.eval_batch_size", "data.image_size", "schedule.epochs"),
        not_negative=("data.mixup",),
    )
    if config.model.dropout is not None and not 0 <= config.model.dropout <= 1:
        raise ValueError(f"model.dropout must be from 0 to 1, or null, got {config.model.dropout}")
    if config.fsdp and config.precision == "float16":
        raise ValueError("precision must be float32 or bfloat16 with fsdp, got 'float16'")


def check(config: Any, positive: Sequence[str] = (), not_negative: Sequence[str] = ()) -> None:
    """Check the keys that configurations of every kind have in common, and these keys besides."""
    for name in (*positive, "data.batch_size", "optimizer.lr", "penalty.interval", "accumulate"):
        value = attrgetter(name)(config)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {_short(value)}")
    for name in (*not_negative, *_NOT_NEGATIVE):
        value = attrgetter(name)(config)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be finite and not negative, got {_short(value)}")
    if "\0" in config.data.source:
        raise ValueError(f"data.source must not hold the character NUL, got {_short(config.data.source)}")
    if config.penalty.kind not in PENALTIES:
        raise ValueError(f"penalty.kind must be one of {', '.join(PENALTIES)}, got {config.penalty.kind!r}")
    if config.optimizer.clip is not None and not config.optimizer.clip > 0:
        raise ValueError(f"optimizer.clip must be positive or null, got {config.optimizer.clip}")
    if config.precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {config.precision!r}")
