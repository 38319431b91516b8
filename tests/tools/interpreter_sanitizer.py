"""A memory, race and overflow checker for kernels that run in Triton's interpreter.

    with sanitize(shuffle=0):
        kernel[grid](...)

The interpreter reads and writes raw memory and runs the programs of a launch one after another, so
most memory bugs pass unseen there. Inside `sanitize` these are errors:

- an active address that is not an element of a tensor argument. The elements are those of the view,
  so the neighbours of a slice are out of bounds. Which argument a pointer was derived from is not
  tracked: an address that belongs to another argument of the same launch is accepted.
- programs of one launch that touch the same element, unless all of them load it or all of them
  update it atomically: a GPU runs programs in any order. Synchronisation through atomics is not
  understood.
- a store with the same address in several active lanes.
- integer overflow in ``+ - *``, where the kernel does not say ``sanitize_overflow=False``.
- a false ``tl.multiple_of``, ``tl.max_contiguous`` or ``tl.max_constancy``.

Masked-off lanes of a load without ``other`` are undefined on a GPU; here they are NaN, or the
largest integer. ``tl.device_assert`` is active.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "FalseHintError",
    "IntegerOverflowError",
    "OutOfBoundsError",
    "ProgramRaceError",
    "SanitizerError",
    "sanitize",
]

_NOBODY = -1
_SEVERAL = -2


class SanitizerError(AssertionError):
    """A bug that `sanitize` found in a kernel."""


class OutOfBoundsError(SanitizerError):
    """An active lane's address is not an element of any argument."""


class ProgramRaceError(SanitizerError):
    """The result depends on the order in which programs, or the lanes of a store, run."""


class IntegerOverflowError(SanitizerError):
    """An integer operation left the range of its type."""


class FalseHintError(SanitizerError):
    """A promise to the compiler does not hold."""


class _AccessLog:
    """Which program has loaded, stored and atomically updated each element of a region."""

    def __init__(self, num_elements: int) -> None:
        self.loads, self.stores, self.atomics = (
            np.full(num_elements, _NOBODY, np.int32) for _ in range(3)
        )

    def record(self, kind: str, elements: np.ndarray, program: int) -> np.ndarray:
        """Notes an access, and returns which of `elements` it conflicts on."""
        conflicting_logs = {
            "load": (self.stores, self.atomics),
            "store": (self.loads, self.stores, self.atomics),
            "atomic": (self.loads, self.stores),
        }[kind]
        conflict = np.zeros(elements.shape, bool)
        for log in conflicting_logs:
            users = log[elements]
            conflict |= (users != _NOBODY) & (users != program)
        own_log = {"load": self.loads, "store": self.stores, "atomic": self.atomics}[kind]
        users = own_log[elements]
        is_sole_user = (users == _NOBODY) | (users == program)
        own_log[elements] = np.where(is_sole_user, program, _SEVERAL)
        return conflict


class _Region:
    """The elements of one tensor argument, numbered from 0."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self.itemsize = tensor.element_size()
        self.base = tensor.data_ptr()
        self._dims = _merged_dims(tensor)
        self._offsets: np.ndarray | None = None
        # one past the largest offset; 0 for a tensor without elements
        self.span = 1 if tensor.numel() else 0
        has_overlap = False
        for stride, size in self._dims:
            has_overlap |= stride < self.span
            self.span += stride * (size - 1) if self.span else 0
        self.num_elements = math.prod(size for _, size in self._dims) if self.span else 0
        if has_overlap and self.span:
            self._offsets = _distinct_offsets(self._dims)
            self.num_elements = self._offsets.size
        self._log: _AccessLog | None = None

    @property
    def log(self) -> _AccessLog:
        # most launches have arguments that no sanitized access is attributed to
        if self._log is None:
            self._log = _AccessLog(self.num_elements)
        return self._log

    def locate(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns, for each byte address, whether it starts an element, and that element's number.

        The numbers of addresses that start no element are meaningless.
        """
        offsets, misalignment = np.divmod(addresses - self.base, self.itemsize)
        is_element = (offsets >= 0) & (offsets < self.span) & (misalignment == 0)
        if not is_element.any():
            return is_element, offsets
        if self._offsets is not None:
            numbers = np.searchsorted(self._offsets, offsets)
            numbers = np.minimum(numbers, self.num_elements - 1)
            return is_element & (self._offsets[numbers] == offsets), numbers
        # no two index tuples share an offset, and each stride exceeds all smaller ones together:
        # the indices are the digits of the offset, and nothing of the tensor's size is needed
        numbers = np.zeros_like(offsets)
        for stride, size in reversed(self._dims):
            indices, offsets = np.divmod(offsets, stride)
            is_element &= indices < size
            numbers = numbers * size + indices
        return is_element & (offsets == 0), numbers


def _merged_dims(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Returns (stride, size) by ascending stride, with adjoining dimensions merged into one."""
    # an expanded dimension adds no elements
    dims = sorted(
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size > 1 and stride > 0
    )
    merged: list[tuple[int, int]] = []
    for stride, size in dims:
        if merged and stride == merged[-1][0] * merged[-1][1]:
            inner_stride, inner_size = merged.pop()
            merged.append((inner_stride, inner_size * size))
        else:
            merged.append((stride, size))
    return merged


def _distinct_offsets(dims: list[tuple[int, int]]) -> np.ndarray:
    offsets = np.zeros(1, np.int64)
    for stride, size in dims:
        offsets = np.unique(offsets[:, None] + np.arange(size, dtype=np.int64) * stride)
    return offsets


@dataclasses.dataclass
class _State:
    regions: list[_Region]

    def begin_launch(self, names: list[str], args: Any, kwargs: dict[str, Any]) -> None:
        named_args = itertools.chain(zip(names, args, strict=False), kwargs.items())
        self.regions = [
            _Region(name, tensor) for name, arg in named_args for tensor in _tensors_in(arg)
        ]

    def check(self, builder: Any, kind: str, pointers: TensorHandle, mask: Any) -> None:
        """Checks the active addresses of one load, store or atomic update of one program."""
        active = pointers.data.reshape(-1)
        if mask is not None:
            mask_data = mask.data if isinstance(mask, TensorHandle) else np.asarray(mask)
            active = active[np.broadcast_to(mask_data, pointers.data.shape).reshape(-1)]
        addresses = active.astype(np.int64)
        if kind == "store" and np.unique(addresses).size != addresses.size:
            raise ProgramRaceError(f"store by program {builder.grid_idx} writes an address twice")
        x, y, z = builder.grid_idx
        _, size_y, size_z = builder.grid_dim
        program = (x * size_y + y) * size_z + z
        # an address belongs to the first region that has it, so that overlapping arguments
        # share one log for what they share
        rest = addresses
        for region in self.regions:
            if not rest.size:
                return
            is_element, numbers = region.locate(rest)
            elements = numbers[is_element]
            rest = rest[~is_element]
            if not elements.size:
                continue
            conflict = region.log.record(kind, elements, program)
            if conflict.any():
                raise ProgramRaceError(
                    f"{kind} by program {builder.grid_idx} conflicts with another program on "
                    f"element {elements[conflict][0]} of {region.name}"
                )
        if rest.size:
            self._raise_out_of_bounds(builder, kind, rest, addresses.size)

    def _raise_out_of_bounds(
        self, builder: Any, kind: str, outside: np.ndarray, num_active: int
    ) -> None:
        address = int(outside[0])
        message = (
            f"{kind} by program {builder.grid_idx}: {outside.size} of {num_active} active "
            "addresses are outside every argument"
        )
        if self.regions:
            nearest = min(self.regions, key=lambda region: abs(address - region.base))
            offset = (address - nearest.base) / nearest.itemsize
            message += (
                f"; the first is at offset {offset:g} from {nearest.name}, whose elements "
                f"lie at offsets 0 to {nearest.span - 1}"
            )
        raise OutOfBoundsError(message)


def _tensors_in(arg: Any) -> Iterator[torch.Tensor]:
    arg = interpreter._unwrap_tensor(arg)
    if isinstance(arg, torch.Tensor):
        yield arg
    elif isinstance(arg, TensorDescriptor):
        yield from _tensors_in(arg.base)
    elif isinstance(arg, (tuple, list)):
        for item in arg:
            yield from _tensors_in(item)


def _poison(pointers: TensorHandle) -> TensorHandle:
    element_type = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(element_type)
    if element_type == tl.bfloat16:
        value = 0x7FC0
    elif dtype.kind == "f":
        value = np.nan
    elif dtype.kind == "b":
        value = True
    else:
        value = np.iinfo(dtype).max
    return TensorHandle(np.full(pointers.data.shape, value, dtype), element_type)


def _check_hint(data: np.ndarray, key: str, values: list[int]) -> None:
    """Raises if a hint, one value for each dimension of `data`, is false."""
    if key == "tt.divisibility":
        # of a run of consecutive values the hint describes the first; other runs are not checked
        first = int(data.reshape(-1)[0])
        if any(first % value for value in values):
            raise FalseHintError(f"tl.multiple_of is false: {first} is not a multiple of {values}")
        return
    name, step = {
        "tt.contiguity": ("tl.max_contiguous", 1),
        "tt.constancy": ("tl.max_constancy", 0),
    }[key]
    for axis, length in enumerate(values[: data.ndim]):
        differences = np.diff(data.astype(np.int64), axis=axis)
        # a difference between the last of one group and the first of the next is free
        is_within_group = (np.arange(differences.shape[axis]) + 1) % length != 0
        if (np.compress(is_within_group, differences, axis=axis) != step).any():
            raise FalseHintError(f"{name} is false: no groups of {length} along axis {axis}")


def _find_sanitizer_error(error: BaseException | None) -> SanitizerError | None:
    while error is not None and not isinstance(error, SanitizerError):
        error = error.__cause__
    return error


@contextlib.contextmanager
def sanitize(*, shuffle: int | None = None, overflow: bool = True) -> Iterator[None]:
    """Checks every launch that the interpreter runs inside the context.

    Args:
        shuffle: Seed of a random order of the programs of each launch; None keeps the
            interpreter's order.
        overflow: Whether integer overflow is an error. Lanes that are masked off later count too.

    Raises:
        SanitizerError: From the launch, by the subclass that names the bug.
    """
    state = _State(regions=[])
    with contextlib.ExitStack() as stack:

        def patch(owner: Any, name: str, replacement: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, replacement))

        _patch_memory_operations(patch, state)
        _patch_launch(patch, state)
        _patch_hints(patch)
        if overflow:
            _patch_overflow(patch)
        builder = interpreter.interpreter_builder
        # tl.device_assert does something only in debug mode
        options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=overflow)
        patch(builder, "options", options)
        if shuffle is not None:
            _patch_program_order(patch, random.Random(shuffle))
        yield


def _patch_memory_operations(patch: Any, state: _State) -> None:
    original_load = InterpreterBuilder.create_masked_load
    original_store = InterpreterBuilder.create_masked_store
    original_rmw = InterpreterBuilder.create_atomic_rmw
    original_cas = InterpreterBuilder.create_atomic_cas

    def create_masked_load(
        self: Any, ptrs: TensorHandle, mask: Any, other: Any, *args: Any, **kwargs: Any
    ) -> TensorHandle:
        state.check(self, "load", ptrs, mask)
        if other is None and not np.all(getattr(mask, "data", mask)):
            other = _poison(ptrs)
        return original_load(self, ptrs, mask, other, *args, **kwargs)

    def create_masked_store(
        self: Any, ptrs: TensorHandle, value: Any, mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        state.check(self, "store", ptrs, mask)
        return original_store(self, ptrs, value, mask, *args, **kwargs)

    def create_atomic_rmw(
        self: Any, op: Any, ptr: TensorHandle, value: Any, mask: Any, *args: Any
    ) -> TensorHandle:
        state.check(self, "atomic", ptr, mask)
        return original_rmw(self, op, ptr, value, mask, *args)

    def create_atomic_cas(self: Any, ptr: TensorHandle, *args: Any) -> TensorHandle:
        state.check(self, "atomic", ptr, None)
        return original_cas(self, ptr, *args)

    patch(InterpreterBuilder, "create_masked_load", create_masked_load)
    patch(InterpreterBuilder, "create_masked_store", create_masked_store)
    patch(InterpreterBuilder, "create_atomic_rmw", create_atomic_rmw)
    patch(InterpreterBuilder, "create_atomic_cas", create_atomic_cas)


def _patch_launch(patch: Any, state: _State) -> None:
    original_init = GridExecutor._init_args_hst
    original_call = GridExecutor.__call__

    def init_args_hst(self: Any, args_dev: Any, kwargs: Any) -> Any:
        args_host, kwargs_host = original_init(self, args_dev, kwargs)
        state.begin_launch(self.arg_names, args_host, kwargs_host)
        return args_host, kwargs_host

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original_call(self, *args, **kwargs)
        except InterpreterError as error:
            # the interpreter wraps whatever a kernel raises; tests want to name the bug
            found = _find_sanitizer_error(error)
            if found is None:
                raise
            raise found from None

    patch(GridExecutor, "_init_args_hst", init_args_hst)
    patch(GridExecutor, "__call__", call)


def _patch_hints(patch: Any) -> None:
    original_set_attr = TensorHandle.set_attr

    def set_attr(self: TensorHandle, key: str, value: Any) -> None:
        _check_hint(np.asarray(self.data), key, [int(item) for item in value])
        original_set_attr(self, key, value)

    patch(TensorHandle, "set_attr", set_attr)


def _patch_overflow(patch: Any) -> None:
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    original_check = TritonSemantic.binary_op_sanitize_overflow_impl

    def check(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor, binary_op: Any) -> None:
        # the compiler uses the same class
        if not isinstance(self.builder, InterpreterBuilder):
            original_check(self, lhs, rhs, binary_op)
            return
        dtype = lhs.type.scalar
        if dtype.int_bitwidth >= 64:
            return
        operation = operations[binary_op.__name__]
        # a product of two uint32 may leave int64 too, but then it wraps to a negative number
        result = operation(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        is_below = result < dtype.get_int_min_value()
        is_above = result > dtype.get_int_max_value()
        if (is_below | is_above).any():
            raise IntegerOverflowError(f"{dtype} overflow in {binary_op.__name__}")

    # Triton's own check says the same in debug mode, but interprets eight more operations for it
    patch(TritonSemantic, "binary_op_sanitize_overflow_impl", check)


def _patch_program_order(patch: Any, rng: random.Random) -> None:
    original_set_dim = InterpreterBuilder.set_grid_dim
    original_set_idx = InterpreterBuilder.set_grid_idx
    order: Iterator[tuple[int, int, int]] = iter(())

    def set_grid_dim(self: Any, *sizes: int) -> None:
        nonlocal order
        original_set_dim(self, *sizes)
        programs = list(itertools.product(*(range(size) for size in sizes)))
        rng.shuffle(programs)
        order = iter(programs)

    def set_grid_idx(self: Any, *_: int) -> None:
        # the executor asks for each program once, in its own order
        original_set_idx(self, *next(order))

    patch(InterpreterBuilder, "set_grid_dim", set_grid_dim)
    patch(InterpreterBuilder, "set_grid_idx", set_grid_idx)
