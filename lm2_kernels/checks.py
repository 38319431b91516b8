"""What inputs may be: the checks of ``functional``, the layers and the configurations."""

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# what every generator takes, of torch and of numpy
SEEDS = range(2**63)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_tensors(op: str, *, optional: tuple[str, ...] = (), **tensors: Tensor | None) -> None:
    """Each is a dense floating-point tensor, and all are on one device; None only if optional."""
    first_name, first = None, None
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            raise TypeError(
                f"{op}: {name} must be a dense strided tensor, got layout {tensor.layout}; "
                f"convert it with .to_dense() or .dequantize()"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
        if first is None:
            first_name, first = name, tensor
        elif tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {first_name} is on {first.device}; "
                f"move them to one device"
            )


def check_shape(op: str, name: str, tensor: Tensor, legend: str, expected: tuple) -> None:
    """``tensor`` has the expected shape; ``legend`` names its axes, None in it fits any size."""
    if tensor.shape == expected:
        return
    if tensor.dim() != len(expected):
        raise ValueError(
            f"{op}: {name} must have {len(expected)} dimensions {legend}, got shape "
            f"{_shape(tensor)}"
        )
    for size, wanted in zip(tensor.shape, expected, strict=True):
        if wanted is not None and size != wanted:
            wanted_text = ", ".join("*" if w is None else str(w) for w in expected)
            raise ValueError(
                f"{op}: {name} must be {legend} = ({wanted_text}), got {_shape(tensor)}"
            )


def check_nonempty(op: str, name: str, tensor: Tensor, axes: dict[str, int]) -> None:
    """The named axes of ``tensor`` have at least one element (a batch of 0 is fine)."""
    for axis, index in axes.items():
        if tensor.shape[index] == 0:
            raise ValueError(
                f"{op}: {name} must have at least one of {axis}, got shape {_shape(tensor)}"
            )


def check_dtypes(op: str, dtype: torch.dtype, allowed_float32: tuple[str, ...], **tensors) -> None:
    """Each tensor has ``dtype``; those named may also be float32 unless ``dtype`` is float64."""
    for name, tensor in tensors.items():
        if tensor is None or tensor.dtype == dtype:
            continue
        if (
            name in allowed_float32
            and tensor.dtype == torch.float32
            and dtype in (torch.bfloat16, torch.float16)
        ):
            continue
        is_16_bit = dtype in (torch.bfloat16, torch.float16)
        also = " or torch.float32" if is_16_bit and name in allowed_float32 else ""
        raise TypeError(
            f"{op}: {name} is {tensor.dtype} but {dtype}{also} was expected, the dtype of the "
            f"other tensors; cast one or use torch.autocast"
        )


def check_int(op: str, name: str, value: int, low: int, high: int | None = None) -> None:
    """``value`` is an integer with ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{op}: {name} must be {wanted}, got {value}")


def check_bool(op: str, name: str, value: bool) -> None:
    """``value`` is True or False, not something that merely counts as either."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")


def check_dropout(op: str, dropout_p: float) -> None:
    """``0 <= dropout_p < 1``, which NaN is not."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, int | float):
        raise TypeError(f"{op}: dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")


def check_scale(op: str, scale: float) -> None:
    """A finite number."""
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"{op}: scale must be a float, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}")


def check_eps(op: str, eps: float) -> None:
    """A float above 0, which NaN is not."""
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"{op}: eps must be a float, got {type(eps).__name__}")
    if not 0.0 < eps < math.inf:
        raise ValueError(f"{op}: eps must be a float above 0, got {eps!r}")


def check_slot_mask(op: str, slot_mask: Tensor, batch: int, slots: int, device) -> None:
    """A bool tensor (B, N) on the device of the other tensors."""
    if not isinstance(slot_mask, Tensor):
        raise TypeError(f"{op}: slot_mask must be a torch.Tensor, got {type(slot_mask).__name__}")
    if slot_mask.layout != torch.strided or slot_mask.is_nested:
        raise TypeError(
            f"{op}: slot_mask must be a dense strided tensor, got layout {slot_mask.layout}; "
            f"convert it with .to_dense()"
        )
    if slot_mask.dtype != torch.bool:
        raise TypeError(f"{op}: slot_mask must be bool (True = takes part), got {slot_mask.dtype}")
    check_shape(op, "slot_mask", slot_mask, "(B, N)", (batch, slots))
    if slot_mask.device != device:
        raise ValueError(
            f"{op}: slot_mask is on {slot_mask.device} but the other tensors are on {device}; "
            f"move them to one device"
        )


def go_together(first: torch.dtype, second: torch.dtype) -> bool:
    """Whether an op takes both side by side: one dtype, or a 16-bit dtype and float32."""
    return first == second or (
        torch.float32 in (first, second) and torch.float64 not in (first, second)
    )


def check_mixed(op: str, **pair: torch.dtype) -> None:
    """The dtypes of two tensors: one, or a 16-bit dtype and float32."""
    (first_name, first), (second_name, second) = pair.items()
    if go_together(first, second):
        return
    raise TypeError(
        f"{op}: {first_name} is {first} but {second_name} is {second}; they must be "
        f"of one dtype, or one of them float32; cast one or use torch.autocast"
    )


def check_pooled_sum(op: str, pooled_sum: Tensor, x: Tensor) -> None:
    """A sum (B, D) in the dtype of sums, on the device of ``x`` (B, T, D)."""
    check_tensors(op, x=x, pooled_sum=pooled_sum)
    check_shape(op, "pooled_sum", pooled_sum, "(B, D)", (x.shape[0], x.shape[2]))
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if pooled_sum.dtype != wanted:
        raise TypeError(
            f"{op}: pooled_sum must be {wanted} for x of {x.dtype}, got {pooled_sum.dtype}"
        )
