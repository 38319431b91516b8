"""The mean of ``relu(weight * x)`` over tokens on a GPU: of the segment, or running (``prefix``).

Tokens are cut into chunks, whose number depends on the shape alone. One kernel sums each chunk;
the running mean takes a second one, in which each chunk adds the sums of the chunks before it to
the running sum inside it. The backward does the same from the last token to the first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm2_kernels.backends.triton import launch, tables

# At 2048 tokens of width 2048, 32 chunks times 16 column blocks: 512 programs for a batch of one.
# With many more than 64 chunks, adding up those before a chunk would cost more than the chunk.
_MIN_CHUNK = 64
_MAX_CHUNKS = 64


@triton.jit
def _owned(num_tokens, num_chunks, chunk_size, width, BLOCK_D: tl.constexpr):
    """What this program owns: tokens [first, last) of one batch entry, BLOCK_D columns of them."""
    pid = tl.program_id(0)
    chunk = pid % num_chunks
    first = chunk * chunk_size
    last = tl.minimum(first + chunk_size, num_tokens)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    # 64 bits: the batch index meets strides that may be anything
    return (pid // num_chunks).to(tl.int64), chunk, first, last, offs_d, offs_d < width


@triton.jit
def _load(ptr, pid_b, offs_t, offs_d, stride_b, stride_t, mask):
    offs = pid_b * stride_b + offs_t.to(tl.int64)[:, None] * stride_t + offs_d[None, :]
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _relu(x, mask):
    # "not <= 0" instead of "> 0": a NaN stays. The mask, as 0 times an infinite weight is NaN.
    return tl.where(mask & ~(x <= 0.0), x, 0.0)


@triton.jit
def _token_count(offs_t, num_pooled):
    return (offs_t + 1 + num_pooled).to(tl.float32)[:, None]


@triton.jit
def _other_chunks(
    partials_ptr,
    pid_b,
    chunk,
    num_chunks,
    offs_d,
    mask_d,
    width,
    BEFORE: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """Sum of the partial sums (B, C, D) of the chunks before or after this one."""
    offs_c = tl.arange(0, MAX_CHUNKS)
    if BEFORE:
        mask_c = offs_c < chunk
    else:
        mask_c = (offs_c > chunk) & (offs_c < num_chunks)
    offs = (pid_b * num_chunks + offs_c)[:, None] * width + offs_d[None, :]
    mask = mask_c[:, None] & mask_d[None, :]
    return tl.sum(tl.load(partials_ptr + offs, mask=mask, other=0.0), axis=0)


_DYNAMIC = ["num_tokens", "num_chunks", "chunk_size", "num_pooled"]


@triton.jit(do_not_specialize=_DYNAMIC)
def _pooled_gate_fwd_sum_kernel(
    x_ptr,
    weight_ptr,
    partials_ptr,
    stride_xb,
    stride_xt,
    num_tokens,
    num_chunks,
    chunk_size,
    width,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of relu(weight * x) over each chunk. Grid: (batch times chunks, column blocks)."""
    pid_b, chunk, first, last, offs_d, mask_d = _owned(
        num_tokens, num_chunks, chunk_size, width, BLOCK_D
    )
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask = (offs_t < last)[:, None] & mask_d[None, :]
        x = _load(x_ptr, pid_b, offs_t, offs_d, stride_xb, stride_xt, mask)
        acc += _relu(weight * x, mask)
    offs = (pid_b * num_chunks + chunk) * width + offs_d
    tl.store(partials_ptr + offs, tl.sum(acc, axis=0), mask=mask_d)


@triton.jit(do_not_specialize=_DYNAMIC)
def _pooled_gate_fwd_prefix_kernel(
    x_ptr,
    weight_ptr,
    pooled_sum_ptr,
    partials_ptr,
    pooled_ptr,
    new_sum_ptr,
    stride_xb,
    stride_xt,
    stride_sb,
    num_pooled: tl.int64,
    num_tokens,
    num_chunks,
    chunk_size,
    width,
    HAS_POOLED_SUM: tl.constexpr,
    HAS_PARTIALS: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Running mean inside each chunk. Grid: (batch times chunks, column blocks)."""
    pid_b, chunk, first, last, offs_d, mask_d = _owned(
        num_tokens, num_chunks, chunk_size, width, BLOCK_D
    )
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    before = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_POOLED_SUM:
        before += tl.load(pooled_sum_ptr + pid_b * stride_sb + offs_d, mask=mask_d, other=0.0)
    if HAS_PARTIALS:
        before += _other_chunks(
            partials_ptr, pid_b, chunk, num_chunks, offs_d, mask_d, width, True, MAX_CHUNKS
        )
    inside = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, last, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask = (offs_t < last)[:, None] & mask_d[None, :]
        x = _load(x_ptr, pid_b, offs_t, offs_d, stride_xb, stride_xt, mask)
        active = _relu(weight * x, mask)
        # small sums first: the largest term joins last
        pooled = before[None, :] + (inside[None, :] + tl.cumsum(active, axis=0))
        pooled = pooled / _token_count(offs_t, num_pooled)
        offs = (pid_b * num_tokens + offs_t)[:, None] * width + offs_d[None, :]
        tl.store(pooled_ptr + offs, pooled.to(pooled_ptr.dtype.element_ty), mask=mask)
        inside += tl.sum(active, axis=0)
    if chunk == num_chunks - 1:
        tl.store(new_sum_ptr + pid_b * width + offs_d, before + inside, mask=mask_d)


@triton.jit(do_not_specialize=_DYNAMIC)
def _pooled_gate_bwd_sum_kernel(
    dpooled_ptr,
    partials_ptr,
    stride_yb,
    stride_yt,
    num_pooled: tl.int64,
    num_tokens,
    num_chunks,
    chunk_size,
    width,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of dpooled / count over each chunk. Grid: (batch times chunks, column blocks)."""
    pid_b, chunk, first, last, offs_d, mask_d = _owned(
        num_tokens, num_chunks, chunk_size, width, BLOCK_D
    )
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask = (offs_t < last)[:, None] & mask_d[None, :]
        dpooled = _load(dpooled_ptr, pid_b, offs_t, offs_d, stride_yb, stride_yt, mask)
        acc += dpooled / _token_count(offs_t, num_pooled)
    offs = (pid_b * num_chunks + chunk) * width + offs_d
    tl.store(partials_ptr + offs, tl.sum(acc, axis=0), mask=mask_d)


@triton.jit(do_not_specialize=_DYNAMIC)
def _pooled_gate_bwd_kernel(
    dpooled_ptr,
    dnew_sum_ptr,
    x_ptr,
    weight_ptr,
    partials_ptr,
    dx_ptr,
    dweight_ptr,
    dpooled_sum_ptr,
    stride_yb,
    stride_yt,
    stride_nb,
    stride_xb,
    stride_xt,
    num_pooled: tl.int64,
    num_tokens,
    num_chunks,
    chunk_size,
    width,
    PREFIX: tl.constexpr,
    HAS_DPOOLED: tl.constexpr,
    HAS_DNEW_SUM: tl.constexpr,
    HAS_PARTIALS: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    NEEDS_DPOOLED_SUM: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx, and the sums for dweight (B * C, D). Grid: (batch times chunks, column blocks)."""
    pid_b, chunk, first, last, offs_d, mask_d = _owned(
        num_tokens, num_chunks, chunk_size, width, BLOCK_D
    )
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    # the gradient of the running sum, from the tokens after this chunk and those inside it
    after = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_DNEW_SUM:
        after += tl.load(dnew_sum_ptr + pid_b * stride_nb + offs_d, mask=mask_d, other=0.0)
    if HAS_DPOOLED and not PREFIX:
        dpooled = tl.load(dpooled_ptr + pid_b * stride_yb + offs_d, mask=mask_d, other=0.0)
        after += dpooled.to(tl.float32) / num_tokens
    if HAS_PARTIALS:
        after += _other_chunks(
            partials_ptr, pid_b, chunk, num_chunks, offs_d, mask_d, width, False, MAX_CHUNKS
        )
    inside = tl.zeros((BLOCK_D,), tl.float32)
    dweight = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, last - first, BLOCK_T):
        # from the last token to the first: so a running sum over rows is one over later tokens
        offs_t = last - 1 - start - tl.arange(0, BLOCK_T)
        mask = (offs_t >= first)[:, None] & mask_d[None, :]
        dactive = after[None, :]
        if HAS_DPOOLED and PREFIX:
            dpooled = _load(dpooled_ptr, pid_b, offs_t, offs_d, stride_yb, stride_yt, mask)
            # rows before the chunk have counts down to 0 or less, and 0 / 0 is NaN
            dpooled = tl.where(mask, dpooled / _token_count(offs_t, num_pooled), 0.0)
            dactive += inside[None, :] + tl.cumsum(dpooled, axis=0)
            inside += tl.sum(dpooled, axis=0)
        if NEEDS_DX or NEEDS_DWEIGHT:
            x = _load(x_ptr, pid_b, offs_t, offs_d, stride_xb, stride_xt, mask)
            dactive = tl.where(mask & ~(weight * x <= 0.0), dactive, 0.0)
            if NEEDS_DX:
                offs = (pid_b * num_tokens + offs_t)[:, None] * width + offs_d[None, :]
                dx = dactive * weight
                tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if NEEDS_DWEIGHT:
                dweight += dactive * x
    if NEEDS_DWEIGHT:
        offs = (pid_b * num_chunks + chunk) * width + offs_d
        tl.store(dweight_ptr + offs, tl.sum(dweight, axis=0), mask=mask_d)
    if NEEDS_DPOOLED_SUM:
        # the earlier pieces' sum enters every running sum: the first chunk has seen them all
        if chunk == 0:
            tl.store(dpooled_sum_ptr + pid_b * width + offs_d, after + inside, mask=mask_d)


def _chunks(num_tokens: int, block_t: int) -> tuple[int, int]:
    """Number of chunks and tokens in each; the last one may be shorter, none is empty."""
    size = max(_MIN_CHUNK, triton.cdiv(num_tokens, _MAX_CHUNKS))
    size = triton.cdiv(size, block_t) * block_t
    return triton.cdiv(num_tokens, size), size


def _choice(x: Tensor) -> tuple[tables.Config, int, int]:
    """Configuration, number of chunks, tokens in each."""
    config = tables.pooled_gate(launch.target_of(x), x.shape[-1])
    return config, *_chunks(x.shape[1], config.block_rows)


def _tile(config: tables.Config) -> dict[str, int]:
    return {
        "BLOCK_T": config.block_rows,
        "BLOCK_D": config.block_cols,
        "num_warps": config.num_warps,
    }


def pooled_gate_forward(
    x: Tensor,  # (B, T, D)
    weight: Tensor,  # (D,)
    pooled_sum: Tensor | None,  # (B, D)
    prefix: bool,
    num_pooled: int,
) -> tuple[Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends`."""
    x, weight, pooled_sum = map(launch.last_contiguous, (x, weight, pooled_sum))
    batch, num_tokens, width = x.shape
    inputs = (x, weight, pooled_sum)
    launches = launch.launches("pooled_gate", inputs, prefix)
    config, num_chunks, chunk_size = launches.once(_choice, x)
    partials = pooled = None
    if prefix:
        pooled = x.new_empty(x.shape)
        new_sum = x.new_empty((batch, width), dtype=torch.float32)
    if not prefix or num_chunks > 1:
        partials = x.new_empty((batch, num_chunks, width), dtype=torch.float32)
    if x.numel() == 0:
        if not prefix:
            pooled, new_sum = x.new_empty((batch, 1, width)), partials.new_empty((batch, width))
        return pooled, new_sum
    # not triton.cdiv, which takes microseconds: this is every call
    grid = (batch * num_chunks, -(-width // config.block_cols))
    sizes = (num_tokens, num_chunks, chunk_size, width)

    def sum_arguments() -> launch.Arguments:
        return grid, (*launch.row_strides(x), *sizes), _tile(config)

    def prefix_arguments() -> launch.Arguments:
        strides = (*launch.row_strides(x), *launch.row_strides(pooled_sum, 1))
        constants = {
            "HAS_POOLED_SUM": pooled_sum is not None,
            "HAS_PARTIALS": partials is not None,
            "MAX_CHUNKS": _MAX_CHUNKS,
            **_tile(config),
        }
        return grid, (*strides, num_pooled, *sizes), constants

    if partials is not None:
        launches.run(_pooled_gate_fwd_sum_kernel, (x, weight, partials), sum_arguments)
    if prefix:
        tensors = (x, weight, pooled_sum, partials, pooled, new_sum)
        launches.run(
            _pooled_gate_fwd_prefix_kernel, tensors, prefix_arguments, ("num_pooled", num_pooled)
        )
    if not prefix:
        new_sum = partials.sum(1)
        pooled = (new_sum / num_tokens).to(x.dtype)[:, None, :]
    return pooled, new_sum


def pooled_gate_backward(
    dpooled: Tensor | None,  # (B, 1, D), or (B, T, D) with prefix
    dnew_sum: Tensor | None,  # (B, D)
    x: Tensor,  # (B, T, D)
    weight: Tensor,  # (D,)
    prefix: bool,
    num_pooled: int,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dpooled_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends`."""
    dpooled, dnew_sum, x, weight = map(launch.last_contiguous, (dpooled, dnew_sum, x, weight))
    batch, num_tokens, width = x.shape
    needs_dpooled_sum = needs_dpooled_sum and prefix
    dx = x.new_empty(x.shape if needs_dx else 0)
    dpooled_sum = x.new_empty((batch, width) if needs_dpooled_sum else 0, dtype=torch.float32)
    if x.numel() == 0 or not (needs_dx or needs_dweight or needs_dpooled_sum):
        return dx, weight.new_zeros(width if needs_dweight else 0), dpooled_sum

    needs = (needs_dx, needs_dweight, needs_dpooled_sum)
    inputs = (dpooled, dnew_sum, x, weight)
    launches = launch.launches("pooled_gate_backward", inputs, prefix, needs)
    config, num_chunks, chunk_size = launches.once(_choice, x)
    partials = dweight = None
    if prefix and dpooled is not None and num_chunks > 1:
        partials = x.new_empty((batch, num_chunks, width), dtype=torch.float32)
    if needs_dweight:
        dweight = x.new_empty((batch * num_chunks, width), dtype=torch.float32)
    # not triton.cdiv, which takes microseconds: this is every call
    grid = (batch * num_chunks, -(-width // config.block_cols))
    sizes = (num_tokens, num_chunks, chunk_size, width)

    def sum_arguments() -> launch.Arguments:
        return grid, (*launch.row_strides(dpooled), num_pooled, *sizes), _tile(config)

    def arguments() -> launch.Arguments:
        strides = (
            *launch.row_strides(dpooled),
            *launch.row_strides(dnew_sum, 1),
            *launch.row_strides(x),
        )
        constants = {
            "PREFIX": prefix,
            "HAS_DPOOLED": dpooled is not None,
            "HAS_DNEW_SUM": dnew_sum is not None,
            "HAS_PARTIALS": partials is not None,
            "NEEDS_DX": needs_dx,
            "NEEDS_DWEIGHT": needs_dweight,
            "NEEDS_DPOOLED_SUM": needs_dpooled_sum,
            "MAX_CHUNKS": _MAX_CHUNKS,
            **_tile(config),
        }
        return grid, (*strides, num_pooled, *sizes), constants

    if partials is not None:
        tensors = (dpooled, partials)
        launches.run(
            _pooled_gate_bwd_sum_kernel, tensors, sum_arguments, ("num_pooled", num_pooled)
        )
    tensors = (*inputs, partials, dx, dweight, dpooled_sum)
    launches.run(_pooled_gate_bwd_kernel, tensors, arguments, ("num_pooled", num_pooled))
    dweight = weight.new_empty(0) if dweight is None else dweight.sum(0).to(weight.dtype)
    return dx, dweight, dpooled_sum
