"""A kernel that writes out the dropout mask which the attention kernels compute inside."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm2_kernels.backends import dropout
from lm2_kernels.backends.triton.primitives import dropout_keep, dropout_row_keys


@triton.jit
def _keep_mask_kernel(seed_ptr, rows_ptr, out_ptr, threshold: tl.int64, NUM_SLOTS: tl.constexpr):
    row = tl.program_id(0)
    slots = tl.arange(0, NUM_SLOTS)
    rows = tl.load(rows_ptr + row + tl.zeros([1], tl.int32))
    key_a, key_b = dropout_row_keys(tl.load(seed_ptr), rows)
    keep = dropout_keep(key_a, key_b, slots, threshold)
    tl.store(out_ptr + row * NUM_SLOTS + slots, keep.to(tl.uint8))


def keep_mask(seed: Tensor, dropout_p: float, rows: Tensor, num_slots: int) -> Tensor:
    """As :func:`lm2_kernels.backends.dropout.keep_mask`, for a power of two of slots."""
    out = torch.empty(len(rows), num_slots, dtype=torch.uint8)
    _keep_mask_kernel[(len(rows),)](
        seed, rows, out, dropout.threshold(dropout_p), NUM_SLOTS=num_slots
    )
    return out.bool()
