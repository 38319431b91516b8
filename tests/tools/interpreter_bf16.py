"""Repairs bfloat16 in Triton's interpreter, and makes TF32 visible there.

The interpreter keeps bfloat16 as uint16 bit patterns: it truncates when it casts to bfloat16, and
computes with the patterns as if they were integers. After `install` a bfloat16 operation computes
in float32 and rounds its result to nearest even.

A float32 ``tl.dot`` reads only 10 mantissa bits of its operands on tensor cores, unless the kernel
asks for ``input_precision="ieee"``; the interpreter multiplies exactly and would hide that.

And ``tl.dot`` adds up its terms in one order, whichever operand comes first, as the instructions of
a GPU do; ``tl.sum`` along an axis by halves, as a GPU's lanes and warps do. NumPy's order depends
on shapes, on strides and on the processor. And where a kernel asks for the number beside a NaN, it
gets the number, also from releases before 3.8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

__all__ = ["bf16_to_f32", "f32_to_bf16", "install", "uninstall"]

_TF32_MASK = np.uint32(0xFFFFE000)

# (owner, name, original) of everything `install` has replaced; empty when not installed
_replaced: list[tuple[type, str, Any]] = []


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Rounds float32 to nearest even bfloat16, as uint16 bit patterns.

    Equal to torch bit for bit, except that every NaN becomes 0x7FC0: which NaN torch returns
    depends on the length and alignment of its input.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    lowest_kept_bit = (bits >> 16) & 1
    # wraps for some NaN patterns, which are replaced below
    rounded = ((bits + (0x7FFF + lowest_kept_bit)) >> 16).astype(np.uint16)
    rounded = np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return rounded.reshape(np.shape(values))


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """Widens uint16 bfloat16 bit patterns to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _is_bf16(handle: Any) -> bool:
    if not isinstance(handle, TensorHandle) or isinstance(handle.dtype, tl.pointer_type):
        return False
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    if not _is_bf16(handle):
        return handle
    return TensorHandle(bf16_to_f32(handle.data), tl.float32)


def _narrow_like(handle: TensorHandle, was_bf16: bool) -> TensorHandle:
    # the result of a comparison is bool and stays as it is
    if not was_bf16 or handle.data.dtype != np.float32:
        return handle
    return TensorHandle(f32_to_bf16(handle.data), tl.bfloat16)


def _drop_tf32_bits(handle: TensorHandle) -> TensorHandle:
    if handle.data.dtype != np.float32:
        return handle
    bits = np.ascontiguousarray(handle.data).view(np.uint32)
    return TensorHandle((bits & _TF32_MASK).view(np.float32), handle.dtype)


def _replace(owner: type, name: str, make_replacement: Any) -> None:
    original = getattr(owner, name, None)
    _replaced.append((owner, name, original))
    setattr(owner, name, make_replacement(original))


def _make_cast(original: Any) -> Any:
    def cast_impl(self: Any, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        source, destination = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, destination):
            return original(self, src, dst_type)
        if source == destination:
            return src
        if source == tl.bfloat16:
            dtype = interpreter._get_np_dtype(destination)
            return TensorHandle(bf16_to_f32(src.data).astype(dtype), destination)
        return TensorHandle(f32_to_bf16(src.data.astype(np.float32)), tl.bfloat16)

    return cast_impl


def _make_fp_to_fp(original: Any) -> Any:
    def create_fp_to_fp(self: Any, src: TensorHandle, dst_type: tl.dtype, rounding: Any) -> Any:
        involves_bf16 = tl.bfloat16 in (src.dtype.scalar, dst_type.scalar)
        if involves_bf16 and rounding == ir.ROUNDING_MODE.RTNE:
            return self.cast_impl(src, dst_type)
        return original(self, src, dst_type, rounding)

    return create_fp_to_fp


def _dot(a: np.ndarray, b: np.ndarray, d: np.ndarray) -> np.ndarray:
    total = np.zeros(d.shape, d.dtype)
    for k in range(a.shape[-1]):
        total += a[..., :, k, None].astype(d.dtype) * b[..., k, None, :].astype(d.dtype)
    return d + total


def _make_dot(emulate_tf32: bool) -> Any:
    def make(original: Any) -> Any:
        def create_dot(
            self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, *rest: Any
        ) -> TensorHandle:
            # checked before widening: bfloat16 operands never lose bits to TF32
            if emulate_tf32 and precision == ir.INPUT_PRECISION.TF32:
                a, b = _drop_tf32_bits(a), _drop_tf32_bits(b)
            d_is_bf16, d = _is_bf16(d), _widen(d)
            result = TensorHandle(_dot(_widen(a).data, _widen(b).data, d.data), d.dtype.scalar)
            return _narrow_like(result, d_is_bf16)

        return create_dot

    return make


def _make_binary(original: Any) -> Any:
    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        result = original(self, _widen(lhs), _widen(rhs), op)
        return _narrow_like(result, _is_bf16(lhs) or _is_bf16(rhs))

    return binary_op


def _make_unary(original: Any) -> Any:
    def unary_op(self: Any, arg: TensorHandle, *op: Any) -> TensorHandle:
        return _narrow_like(original(self, _widen(arg), *op), _is_bf16(arg))

    return unary_op


def _make_fma(original: Any) -> Any:
    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        return _narrow_like(original(self, _widen(x), _widen(y), _widen(z)), _is_bf16(z))

    return create_fma


def _make_clamp(original: Any) -> Any:
    def create_clampf(
        self: Any, arg: TensorHandle, low: TensorHandle, high: TensorHandle, *rest: Any
    ) -> TensorHandle:
        result = original(self, _widen(arg), _widen(low), _widen(high), *rest)
        return _narrow_like(result, _is_bf16(arg))

    return create_clampf


def _make_number_of(smaller_or_larger: np.ufunc) -> Any:
    """Of a NaN and a number the number, which Triton's interpreter has from 3.8 on."""

    def make(original: Any) -> Any:
        def create(self: Any, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
            return self.binary_op(lhs, rhs, smaller_or_larger)

        return create

    return make


def _make_bf16_constant(original: Any) -> Any:
    def get_bf16(self: Any, value: float) -> TensorHandle:
        return TensorHandle(f32_to_bf16(np.array([value], np.float32)), tl.bfloat16)

    return get_bf16


def _with_element_type(tensor: tl.tensor, handle: TensorHandle) -> tl.tensor:
    if tensor.type.is_block():
        return tl.core.tensor(handle, tl.block_type(handle.dtype, list(handle.data.shape)))
    return tl.core.tensor(handle, handle.dtype)


def _make_reduce_or_scan(original: Any) -> Any:
    def apply_impl(self: Any, inputs: tuple) -> Any:
        was_bf16 = [_is_bf16(tensor.handle) for tensor in inputs]
        if not any(was_bf16):
            return original(self, inputs)
        widened = tuple(_with_element_type(tensor, _widen(tensor.handle)) for tensor in inputs)
        results = original(self, widened)
        is_single = not isinstance(results, (tuple, list))
        results = (results,) if is_single else results
        # result i is the reduction of input i
        narrowed = tuple(
            _with_element_type(result, _narrow_like(result.handle, narrow))
            for result, narrow in zip(results, was_bf16, strict=True)
        )
        return narrowed[0] if is_single else narrowed

    return apply_impl


def _make_sum(original: Any) -> Any:
    def add_up(self: Any, tensor: tl.tensor) -> tl.tensor:
        data = tensor.handle.data
        if self.axis is None or data.dtype.kind != "f":
            return original(self, tensor)
        while data.shape[self.axis] > 1:
            low, high = np.split(data, 2, axis=self.axis)
            data = low + high
        if not self.keep_dims:
            data = data.squeeze(self.axis)
        return self.to_tensor(data, tensor.dtype)

    return add_up


def install(*, emulate_tf32: bool = True) -> None:
    """Repairs the interpreter of this process; a second call does nothing.

    Args:
        emulate_tf32: Whether a float32 dot without ``input_precision="ieee"`` loses the 13 low
            mantissa bits of its operands. Hardware may round where this truncates.
    """
    if _replaced:
        return
    _replace(InterpreterBuilder, "cast_impl", _make_cast)
    _replace(InterpreterBuilder, "create_fp_to_fp", _make_fp_to_fp)
    _replace(InterpreterBuilder, "create_dot", _make_dot(emulate_tf32))
    _replace(InterpreterBuilder, "binary_op", _make_binary)
    _replace(InterpreterBuilder, "unary_op", _make_unary)
    _replace(InterpreterBuilder, "create_rsqrt", _make_unary)
    _replace(InterpreterBuilder, "create_erf", _make_unary)
    _replace(InterpreterBuilder, "create_fma", _make_fma)
    _replace(InterpreterBuilder, "create_clampf", _make_clamp)
    _replace(InterpreterBuilder, "get_bf16", _make_bf16_constant)
    _replace(InterpreterBuilder, "create_minnumf", _make_number_of(np.fmin))
    _replace(InterpreterBuilder, "create_maxnumf", _make_number_of(np.fmax))
    _replace(interpreter.ReduceOps, "apply_impl", _make_reduce_or_scan)
    _replace(interpreter.ReduceOps, "sum", _make_sum)
    _replace(interpreter.ScanOps, "apply_impl", _make_reduce_or_scan)


def uninstall() -> None:
    """Undoes `install`."""
    while _replaced:
        owner, name, original = _replaced.pop()
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
