"""What layers of the form "frequency" need beyond the tables of tiles: patches to transform, and where D_C and D_S lie.

spectrum    float32, D_C and D_S of every layer, block and frequency (see transform.py), padded to whole tiles
    element = layer base + (((block * frequencies + f) * 2 + part) * padded + m) * length + n
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .layout import VIEW
from .packed import PANEL, Packed, Unit, pad
from .rows import joined, product, tabulate
from .tiles import BACK_ROWS, PATCH_COLUMNS, TAPS, THERE_FREQUENCIES, THERE_ROWS, GradTile
from .transform import PATCH


class Spectrum(NamedTuple):
    """Tables of the two transforms. D of a layer is written by the grad kernel through its row of `views`."""

    there: np.ndarray  # patches of weights
    back: np.ndarray  # patches of gradients
    waves: np.ndarray
    views: np.ndarray
    size: int  # elements of D


def plan_spectrum(packed: Sequence[Packed], tiles: Sequence[GradTile], order: Sequence[int]) -> Spectrum:
    there: list[np.ndarray] = []
    back: list[np.ndarray] = []
    waves = [np.zeros(0, np.float32)]
    known: dict[tuple, tuple[int, int, int]] = {}
    views = np.zeros(len(packed), VIEW)
    size = 0
    for n in (n for n in order if packed[n].by_frequency and packed[n].units):
        p = packed[n]
        length = pad(p.columns, tiles[n].columns)
        _place(views[n], p, 4 * size, length)
        key = p.layer.kernel, p.units
        if key not in known:
            known[key] = _append_waves(p.layer.kernel, p.units, p.layer.grid, waves)
        there.append(_patches(n, p, range(0, p.padded, THERE_ROWS), size // 64, length, known[key]))
        back.append(_patches(n, p, range(0, p.rows, BACK_ROWS), size // 64, length, known[key]))
        size += p.blocks * p.gradients * p.padded * length
    return Spectrum(joined(there, PATCH), joined(back, PATCH), np.concatenate(waves), views, size)


def _place(view: np.void, p: Packed, address: int, length: int) -> None:
    """Describe D of one layer: frequencies count as groups, C and S as taps; whole tiles of contiguous columns."""
    plane = p.padded * length
    view["address"], view["group_stride"], view["row_stride"], view["column_stride"] = address, 2 * plane, length, 1
    view["tap_strides"][2], view["kernel"] = plane, (1, 2)
    view["path"] = 1
    view["rows"], view["columns"] = p.padded, length
    view["merged"], view["groups"] = 1, p.blocks * len(p.units)
    view["taps_in_rows"] = view["taps_in_columns"] = 1


def _patches(n: int, p: Packed, rows: range, first: int, length: int, waves: tuple[int, int, int]) -> np.ndarray:
    block, column, row = product(range(p.blocks), range(0, p.columns, PATCH_COLUMNS), rows)
    half, cosines, sines = waves
    size = p.padded * length // 64
    return tabulate(
        PATCH,
        layer=n,
        block=block,
        row=row,
        column=column,
        out_row=p.plane_base + block * p.planes * p.tap_rows + column // PANEL * p.padded + row,
        out_column=column % PANEL,
        plane_rows=p.tap_rows,
        first=first + block * p.gradients * size + (row * length + column) // 64,
        length=length,
        size=size,
        frequencies=len(p.units),
        real=int(not any(p.units[0])),
        taps=p.layer.taps,
        half=half,
        cosines=cosines,
        sines=sines,
    )


def _append_waves(
    kernel: tuple[int, ...], frequencies: tuple[Unit, ...], grid: tuple[int, ...], waves: list[np.ndarray]
) -> tuple[int, int, int]:
    """Append cos(wq) and sin(wq) of every frequency and the first half of the taps, counted from the middle tap, whose
    cosine is halved.

    Returns the length of their lines, and where the cosines and the sines begin.
    """
    taps = np.array(list(itertools.product(*map(range, kernel))), np.float64) - (np.array(kernel) - 1) / 2
    taps = taps[: (len(taps) + 1) // 2]
    share = np.where(taps.any(1), 1.0, 0.5)
    turns = np.array(frequencies, np.float64).reshape(-1, len(kernel)) / grid
    angles = 2 * math.pi * turns @ taps.T
    lines, half = pad(len(angles), THERE_FREQUENCIES), pad(len(taps), TAPS)
    start = sum(map(len, waves))
    for wave in (share * np.cos(angles), np.sin(angles)):
        padded = np.zeros((lines, half), np.float32)
        padded[: len(angles), : len(taps)] = wave
        waves.append(padded.ravel())
    return half, start, start + lines * half
