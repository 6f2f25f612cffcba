"""Makes Triton's CPU interpreter compute what a GPU computes; apply with `repair()` before a kernel runs.

Triton 3.6.0, with TRITON_INTERPRET=1, multiplies bf16 operands as if their bits were integers, rounds float32 to bf16
without carrying into the exponent, and computes tf32 products in float32. It also patches the language anew at every
call of a helper function, over the patches that are there, and describes shapes and types anew at every operation: most
of the time that small kernels take.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """Ten bits of mantissa, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000).astype(np.uint32).view(np.float32)


def _cast(convert, self, source, to, *rest):
    if source.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
        return Handle(bf16_to_f32(source.data), tl.float32)
    if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        return Handle(f32_to_bf16(source.data), tl.bfloat16)
    return convert(self, source, to, *rest)


def _dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc):
    def operand(x):
        values = bf16_to_f32(x.data) if x.dtype.scalar == tl.bfloat16 else x.data
        tf32 = x.dtype.scalar == tl.float32 and str(input_precision).upper().endswith("TF32")
        return round_to_tf32(values) if tf32 else values

    return Handle(operand(a) @ operand(b) + accumulator.data, accumulator.dtype.scalar)


def _remember_types() -> None:
    """A type's numpy dtype, a block's type and a tensor's shape are described once each."""
    dtype_of, describe, unwrap = interpreter._get_np_dtype, tl.block_type.__init__, tl.core._unwrap_if_constexpr
    dtypes, blocks = {}, {}

    def np_dtype(dtype):
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = dtype_of(dtype.scalar)
        return dtypes[name]

    def block_type(self, element, shape):
        key = element.name, *map(unwrap, shape)
        if key not in blocks:
            describe(self, element, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    @functools.cache
    def extent(*sizes):
        return tl.core.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = extent(*(type.shape if type.is_block() else ()))

    interpreter._get_np_dtype, tl.block_type.__init__, tl.tensor.__init__ = np_dtype, block_type, tensor


def _patch_attr(owner, name, builtin, builder, scope) -> None:
    """As Triton's, without a copy of the arguments at every call."""
    function, semantic = getattr(builtin, "__wrapped__", builtin), interpreter.TritonSemantic(builder)

    def interpreted(*arguments, _semantic=None, **options):
        return function(*arguments, _semantic=semantic, **options)

    scope.set_attr(owner, name, interpreted)


def repair() -> None:
    if Builder.create_dot is _dot:
        return
    Builder.create_dot = _dot
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(Builder, name, functools.partialmethod(functools.partial(_cast, getattr(Builder, name))))
    _remember_types()
    interpreter._patch_attr = _patch_attr
    patch = interpreter._patch_lang
    patched: set[tuple[bool, bool]] = set()

    @functools.cache
    def patch_once(fn):
        modules = list(filter(inspect.ismodule, fn.__globals__.values()))
        key = tl in modules, tl.core in modules
        if key not in patched:
            patched.add(key)
            patch(fn)
        return interpreter._LangPatchScope()  # nothing to restore: the process does nothing else

    interpreter._patch_lang = patch_once
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)  # as on a GPU
    interpreter.interpreter_builder.options = options
