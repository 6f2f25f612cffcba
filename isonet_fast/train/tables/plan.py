"""What a table of the paper consists of: its rows as overrides of presets, read from tables.yaml."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from .. import config, plain_yaml
from ..config import Config

SCALES = ("small", "cifar", "imagenet")


@dataclass(frozen=True)
class TableRow:
    """One network and how it is trained: a preset, and `KEY=VALUE` settings that override it."""

    name: str
    preset: str
    settings: tuple[str, ...]
    published: float | None = None  # top-1, only at the scale "imagenet"
    kind: Any = Config  # the dataclass of its configuration

    @property
    def folder(self) -> str:
        """A name for its directory."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower().replace("= -", "=minus ")).strip("-")

    def config(self, seed: int, lr: float | None, more: Sequence[str] = ()) -> Any:
        """The row's configuration. lr: None for the preset's own. The settings in `more` override all others."""
        rate = [] if lr is None else [f"optimizer.lr={lr!r}"]
        return config.load_as(self.kind, self.preset, [*self.settings, *rate, f"seed={seed}", *more])


def words(settings: dict[str, Any]) -> tuple[str, ...]:
    """Settings as `KEY=VALUE`."""
    return tuple(f"{key}={json.dumps(value)}" for key, value in settings.items())


def only(name: str | None, rows: Sequence[TableRow], number: int) -> tuple[TableRow, ...]:
    """The row of that name in table `number`, or all rows for None; ValueError for an unknown name."""
    chosen = tuple(row for row in rows if name is None or row.name.lower() == name.lower())
    if not chosen:
        known = "; ".join(row.name for row in rows)
        raise ValueError(f"--only must be a row of table {number} at this scale ({known}), got {name!r}")
    return chosen


@dataclass(frozen=True)
class Table:
    """A table. learning_rates: each row is trained with each of them, or with its preset's own if there are none."""

    number: int
    scale: str
    title: str
    rows: tuple[TableRow, ...]
    learning_rates: tuple[float, ...]
    seeds: int

    @property
    def rates(self) -> tuple[float | None, ...]:
        return self.learning_rates or (None,)


def numbers() -> list[int]:
    """The numbers of the tables that there are."""
    return list(_read()["tables"])


def table(number: int, scale: str) -> Table:
    """Table `number` at a scale of SCALES; ValueError for an unknown number."""
    everything = _read()
    if number not in everything["tables"]:
        raise ValueError(f"the tables are {', '.join(map(str, everything['tables']))} and 6, got {number}")
    given = everything["tables"][number]
    # The table's own values for this scale override those that the scale has for all tables; settings are joined.
    common, own = everything["scales"][scale], given.get(scale, {})
    both = {**given, **common, **own}
    settings = {**common.get("set", {}), **own.get("set", {})}
    rows = [
        _row(row if scale == "imagenet" else {**row, "published": None}, both["preset"], settings, depth, n)
        for n, depth in enumerate(both.get("depths", [None]))
        for row in both["rows"]
    ]
    return Table(
        number, scale, given["title"], tuple(rows), tuple(both.get("learning_rates", ())), both.get("seeds", 1)
    )


def _read() -> Any:
    path = resources.files(__package__) / "tables.yaml"
    return plain_yaml.parse(path.read_text(encoding="utf-8"), str(path))


def _row(row: dict[str, Any], preset: str, settings: dict[str, Any], depth: int | None, n: int) -> TableRow:
    joined = {**settings, **row.get("set", {})}
    published = row.get("published")
    if depth is None:
        return TableRow(row["name"], preset, words(joined), published)
    name = f"{row['name']}, {depth} layers"
    return TableRow(name, preset.format(depth=depth), words(joined), published and published[n])
