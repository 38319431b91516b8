"""PyTorch's own attention kernels as a way of the forward, where hardware found them to be faster.

They give a log-sum-exp ``L`` of each row of scaled scores. What our backward kernels know of a
row, its largest product and the logarithm to base 2 of a sum, are then ``L / scale`` and 0: the
probabilities ``exp2(scale log2(e) (q k - L / scale) - 0)`` are the same. But one number holds both,
so that what is small beside a large ``L`` is lost: equal slots share as they should only while
their scores are moderate. Nothing is taken from here that a table does not name.
"""

from collections.abc import Callable

import torch
from torch import Tensor

aten = torch.ops.aten


def _cudnn(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float):
    out, log_sum, *_ = aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, scale=scale
    )
    return out, log_sum


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float):
    out, log_sum, *_ = aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, scale=scale
    )
    return out, log_sum


# deterministic forward kernels, of (B, H, T, K); their backward adds up dQ in any order, ours not
KERNELS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"cudnn": _cudnn, "flash": _flash}
# whether a kernel takes such inputs on this device
_TAKES = {
    "cudnn": torch.backends.cuda.can_use_cudnn_attention,
    "flash": torch.backends.cuda.can_use_flash_attention,
}
# below it a log-sum-exp divided by it may pass the range of float32
_LEAST_SCALE = 2.0**-24


def serves(
    name: str,
    query: Tensor,  # (B, T, H, K)
    key: Tensor,  # (B, N, H, K)
    value: Tensor,  # (B, N, H, K)
    causal: bool,
    scale: float,
) -> bool:
    """Whether this kernel computes what a call without mask, dropout and offset means."""
    if query.shape != key.shape or not scale >= _LEAST_SCALE:
        return False
    heads_first = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    return _TAKES[name](torch.backends.cuda.SDPAParams(*heads_first, None, 0.0, causal, False))


def forward(
    name: str, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, K), contiguous, and the statistics (B, H, 2, T) of ours."""
    batch, num_tokens, num_heads, _ = query.shape
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out, log_sum = KERNELS[name](*heads_first, causal, scale)
    statistics = log_sum.new_zeros(batch, num_heads, 2, num_tokens)
    torch.div(log_sum.view(batch, num_heads, num_tokens), scale, out=statistics[:, :, 0])
    return out.transpose(1, 2).contiguous(), statistics
