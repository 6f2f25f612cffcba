"""A plan's tables on one device, and the views through which kernels reach weights and gradients.

Only tables are cached. They are sent from pinned memory without waiting, once per plan; the views again whenever a
tensor's address, strides or dtype changed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..geometry import Layer
from ..gradient_layout import GradientLayout, layout_of
from ..penalty_arguments import check_gradients
from .launch import Launches
from .layout import VIEW
from .plan import Plan

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class DeviceArrays:
    """Copies of host arrays on one device, made on one stream and usable on any."""

    def __init__(self, device: torch.device) -> None:
        if capturing(device):
            raise RuntimeError(
                "the orthogonality penalty met something new while a CUDA graph was captured; call it once with the "
                "same weights, coefficients and precision before the capture"
            )
        self._device = device
        self._tensors: list[Tensor] = []
        if device.type == "cuda":
            self._streams = {torch.cuda.current_stream(device).cuda_stream}  # where they may be read
            self._sent = torch.cuda.Event()

    def add(self, array: np.ndarray) -> Tensor:
        """The copy of an array. Its named columns become those of a matrix."""
        host = torch.from_numpy(_numbers(array))
        if self._device.type == "cuda":
            self._tensors.append(host.pin_memory().to(self._device, non_blocking=True))
            self._sent.record(torch.cuda.current_stream(self._device))
        else:
            self._tensors.append(host.clone())
        return self._tensors[-1]

    def use_on(self, stream: torch.cuda.Stream | None) -> None:
        """Have kernels that are launched on this stream from now on see the copies."""
        if stream is None:
            return
        if torch.cuda.is_current_stream_capturing():
            _captured.add(self)  # a graph may be replayed for ever; what came before the capture has completed
        elif stream.cuda_stream not in self._streams:
            stream.wait_event(self._sent)
            for tensor in self._tensors:
                tensor.record_stream(stream)
            self._streams.add(stream.cuda_stream)


class Table(DeviceArrays):
    """One array that comes and goes by itself."""

    def __init__(self, array: np.ndarray, device: torch.device) -> None:
        super().__init__(device)
        self.tensor = self.add(array)

    def on(self, stream: torch.cuda.Stream | None) -> Tensor:
        self.use_on(stream)
        return self.tensor


def _numbers(array: np.ndarray) -> np.ndarray:
    if array.dtype.names is None:
        return array
    number = np.int64 if array.dtype == VIEW else np.int32
    return array.view(number).reshape(len(array), array.dtype.itemsize // np.dtype(number).itemsize)


_captured: set[DeviceArrays] = set()  # what a CUDA graph reads


class View(NamedTuple):
    """The device's table of one list of tensors, and what it was made from."""

    addresses: list[int]
    strides: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    rows: np.ndarray
    table: Table | None  # None: the kernels can't write these dtypes


class GradientBuffer(NamedTuple):
    """The buffer for the gradients of weights of these strides and dtypes."""

    strides: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    layout: GradientLayout
    table: Table  # its view


class Tables(DeviceArrays):
    """Everything of one plan that lives on one device."""

    plan: Plan
    device: torch.device
    unsplit: tuple[Tensor, Tensor]
    launches: Launches
    aside: torch.cuda.Stream | None  # on a GPU, a stream for what need not be waited for

    def __init__(self, plan: Plan, device: torch.device) -> None:
        super().__init__(device)
        self.plan, self.device = plan, device
        self.pack = self.add(plan.pack_tiles)
        self.gram = {tile: self.add(rows) for tile, rows in plan.gram_tiles.items()}
        self.grad = {tile: self.add(rows) for tile, rows in plan.grad_tiles.items()}
        self.runs = self.add(plan.runs)
        self.ranges = self.add(plan.partial_ranges)
        self.constants = self.add(plan.constants)
        self.shares = self.add(plan.shares)
        self.coefficients = self.add(np.array(plan.coefficients, np.float64))
        self.spectrum_coefficients = self.add(plan.shares * plan.coefficients)
        self.there, self.back = self.add(plan.spectrum.there), self.add(plan.spectrum.back)
        self.waves = self.add(plan.spectrum.waves)
        self.spectrum = {tile: self.add(rows) for tile, rows in plan.spectrum_tiles.items()}
        self.spectrum_view = self.add(plan.spectrum.views)
        self.one = self.add(np.ones(1, np.float32))
        # `parts` and `arrivals` where no tile is split
        self.unsplit = (
            torch.empty(0, dtype=torch.float32, device=device),
            torch.empty(0, dtype=torch.int32, device=device),
        )
        self.launches = Launches()
        self.aside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._static = _static_columns(plan)
        # Newest first. Several: gradients that are made anew at every step often alternate between a few places.
        self._views: dict[str, deque[View]] = {role: deque(maxlen=4) for role in ("read", "add")}
        self._flat: GradientBuffer | None = None

    def view(self, role: str, tensors: Sequence[Tensor], stream: torch.cuda.Stream | None) -> Tensor | None:
        """The view of weights ("read") or of gradients ("add"); None for gradients that are not float32.

        Gradients of kinds not met before are checked (`check_gradients`).
        """
        try:
            strides, dtypes = [t.stride() for t in tensors], [t.dtype for t in tensors]
        except RuntimeError:  # sparse ones have no strides
            check_gradients(tensors)
            raise
        addresses = [t.data_ptr() for t in tensors]
        views = self._views[role]
        for known in views:
            if (known.addresses, known.strides, known.dtypes) == (addresses, strides, dtypes):
                return None if known.table is None else known.table.on(stream)
        if views and (views[0].strides, views[0].dtypes) == (strides, dtypes):
            known = views[0]
            if known.table is None:
                return None
            if capturing(self.device):
                return self._moved(role, known.table.on(stream), known.rows, addresses)
            rows = known.rows  # only addresses differ: gradients are freed and made again
        else:
            if role == "read" and any(map(Tensor.is_neg, tensors)):  # the ops never pass one
                raise ValueError(
                    "a weight is a negated view, which the kernels can't read; weight.resolve_neg() copies it"
                )
            if role == "add":
                check_gradients(tensors)
                if dtypes.count(torch.float32) < len(dtypes):
                    views.appendleft(View(addresses, strides, dtypes, self._static, None))
                    return None
            rows = self._rows(strides, dtypes)
        table = self._placed(rows, addresses, role == "read")
        views.appendleft(View(addresses, strides, dtypes, rows, table))
        return table.on(stream)

    def _moved(self, role: str, known: Tensor, rows: np.ndarray, addresses: list[int]) -> Tensor:
        """A known view with other addresses, without a copy from the host: a graph that is captured allocates gradients
        of its own. The addresses become arguments of a few kernels in the graph."""
        rows = rows.copy()
        rows["address"] = addresses
        self._choose_path(rows, role == "read")
        table = known.clone()
        for name in ("address", "path"):  # the path depends on the address's alignment
            column = table[:, VIEW.fields[name][1] // 8].zero_()  # type: ignore[index]
            torch._foreach_add_(list(column.unbind()), rows[name].tolist())
        return table

    def flat(self, weights: Sequence[Tensor]) -> tuple[GradientLayout, Table]:
        """The layout of the gradients' buffer, and the view of it: addresses relative to its start."""
        strides, dtypes = [t.stride() for t in weights], [t.dtype for t in weights]
        flat = self._flat
        if flat is None or (flat.strides, flat.dtypes) != (strides, dtypes):
            layout = layout_of(weights)
            addresses, packed = [p.at * 4 for p in layout.slots], [p.strides for p in layout.slots]
            rows = self._rows(packed, [torch.float32] * len(weights))
            flat = self._flat = GradientBuffer(strides, dtypes, layout, self._placed(rows, addresses, False))
        return flat.layout, flat.table

    def _rows(self, strides: list, dtypes: list) -> np.ndarray:
        """A view of tensors, one row each, without their addresses."""
        rows = self._static.copy()
        for n, (row, layer, stride, dtype) in enumerate(zip(rows, self.plan.layers, strides, dtypes, strict=True)):
            if sum((k - 1) * abs(s) for k, s in zip(layer.shape, stride, strict=True)) >= 2**31:
                raise ValueError(f"weight {n}, strides {stride}, spans more elements than 32-bit offsets can name")
            outputs, inputs, *taps = stride
            row["group_stride"] = layer.shape[0] // layer.groups * outputs
            row["row_stride"], row["column_stride"] = (inputs, outputs) if layer.transposed else (outputs, inputs)
            sizes = layer.shape[2:]  # a dimension of size 1 has no stride to speak of
            row["tap_strides"][3 - len(taps) :] = [s if k > 1 else 0 for s, k in zip(taps, sizes, strict=True)]
            row["dtype"] = DTYPES[dtype]
            _flatten(row, layer, stride)
        return rows

    def _placed(self, rows: np.ndarray, addresses: list[int], reading: bool) -> Table:
        """The view of tensors at these addresses, on the device."""
        rows["address"] = addresses
        self._choose_path(rows, reading)
        return Table(rows, self.device)

    def _choose_path(self, rows: np.ndarray, reading: bool) -> None:
        """Reading: 2 where rows are closer together than columns. Writing, where a side is contiguous: 1 (columns) or
        2 (rows) if 16-byte stores are possible, else 3 or 4. 0 elsewhere."""
        row, column = rows["row_stride"], rows["column_stride"]
        flat = (rows["taps_in_rows"] == 1) & (rows["taps_in_columns"] == 1)
        if reading:
            rows["path"] = np.where((row < column) & flat, 2, 0)
            return
        plain = flat & (rows["dtype"] == 0) & (rows["merged"] == 1)
        aligned = (rows["address"] % 16 == 0) & (rows["group_stride"] % 4 == 0) & (rows["tap_strides"] % 4 == 0).all(1)
        by_column = np.where(aligned & (row % 4 == 0), 1, 3)
        by_row = np.where(aligned & (column % 4 == 0), 2, 4)
        rows["path"] = np.where(plain & (column == 1), by_column, np.where(plain & (row == 1), by_row, 0))


def _static_columns(plan: Plan) -> np.ndarray:
    """Views that have only the columns that follow from shapes."""
    rows = np.zeros(len(plan.layers), VIEW)
    for row, p in zip(rows, plan.packed, strict=True):
        row["rows"], row["columns"] = p.layer.rows, p.layer.columns
        row["merged"], row["groups"] = p.merged, p.layer.groups
        row["kernel"] = (1, 1, 1, *p.layer.shape[2:])[-2:]
    return rows


def _flatten(row: np.void, layer: Layer, stride: tuple[int, ...]) -> None:
    """penalty="matrix" counts (I/g, k...) as one side: with one stride if memory allows, else by division."""
    inner = 1 if layer.kernel else int(np.prod(layer.shape[2:]))
    if inner > 1:
        expected = stride[-1] * np.cumprod((1, *layer.shape[:1:-1]))[::-1]
        if tuple(stride[1:]) == tuple(expected):
            row["row_stride" if layer.transposed else "column_stride"] = stride[-1]
            inner = 1
    row["taps_in_rows"], row["taps_in_columns"] = (inner, 1) if layer.transposed else (1, inner)
