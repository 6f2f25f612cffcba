"""Tables of rows with named columns, made column by column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def tabulate(columns: np.dtype, /, **values: np.ndarray | int | float) -> np.ndarray:
    """Rows of named columns; a single number is the same in every row."""
    rows = np.zeros(np.broadcast_shapes(*(np.shape(v) for v in values.values())), columns)
    for name, value in values.items():
        rows[name] = value
    return rows


def joined(tables: Sequence[np.ndarray], columns: np.dtype) -> np.ndarray:
    return np.concatenate(tables) if tables else np.zeros(0, columns)


def product(*axes: range) -> list[np.ndarray]:
    """Every combination, the last axis fastest, as one flat array per axis."""
    return [a.ravel() for a in np.meshgrid(*(np.asarray(a, np.int64) for a in axes), indexing="ij")]
