"""``LayerNorm(x + residual)`` on a GPU, also of the ReLU of x, and with ``tanh(residual)`` besides.

The sum, the mean and the variance are taken in float32 from registers, the variance from the
deviations (mean of squares minus square of the mean loses its digits when the mean is large).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm2_kernels.backends.triton import launch, tables
from lm2_kernels.backends.triton.primitives import tanh

# the widest row that is tested; the kernels for wide rows set no limit of their own
MAX_WIDTH = 32768
# The backward sums dweight and dbias over rows in a fixed number of programs, that of no device in
# particular: 512 programs are 97% of 4 full rounds of an H100's 132 multiprocessors. At least 8
# row blocks each, so that the partial sums stay small beside the rows themselves.
_MAX_PARTIALS = 512
_MIN_BLOCKS_PER_PARTIAL = 8


@triton.jit
def _rows(block, num_tokens, num_blocks_t, BLOCK_T: tl.constexpr):
    """Batch entry and tokens of a row block, in 64 bits: they meet strides that may be anything."""
    pid_b = (block // num_blocks_t).to(tl.int64)
    offs_t = ((block % num_blocks_t) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    return pid_b, offs_t, offs_t < num_tokens


@triton.jit
def _load(ptr, pid_b, offs_t, offs_d, stride_b, stride_t, mask):
    offs = pid_b * stride_b + offs_t[:, None] * stride_t + offs_d[None, :]
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_x(ptr, pid_b, offs_t, offs_d, stride_b, stride_t, mask, OF_RELU: tl.constexpr):
    """x, or the ReLU of it, of which NaN stays NaN."""
    x = _load(ptr, pid_b, offs_t, offs_d, stride_b, stride_t, mask)
    return tl.where(x <= 0.0, 0.0, x) if OF_RELU else x


@triton.jit
def _means(g, gn, n, width):
    """The two means that dx takes off, from g = dout * weight, n = normalised row, gn = g * n.

    The mean of n is 0 but for the rounding of the saved mean, which counts where a row's mean is
    large beside its deviations. Its part is put into the first mean.
    """
    # side by side in one reduction: in each the warps wait for one another
    sums = tl.sum(tl.join(tl.join(g, gn), tl.join(n, n)), axis=1)
    of_g, of_n = tl.split(sums)
    sum_g, sum_gn = tl.split(of_g)
    sum_n, _ = tl.split(of_n)
    mean_gn = sum_gn / width
    mean_g = sum_g / width - sum_n / width * mean_gn
    return mean_g[:, None], mean_gn[:, None]


@triton.jit(do_not_specialize=["num_tokens", "num_blocks_t"])
def _residual_layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    tanh_ptr,  # of the residual, or None
    stride_xb,
    stride_xt,
    stride_rb,
    stride_rt,
    num_tokens,
    num_blocks_t,
    width,
    eps: tl.float32,
    OF_RELU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: one program for each block of BLOCK_T whole rows."""
    pid_b, offs_t, mask_t = _rows(tl.program_id(0), num_tokens, num_blocks_t, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < width
    mask = mask_t[:, None] & mask_d[None, :]
    total = _load_x(x_ptr, pid_b, offs_t, offs_d, stride_xb, stride_xt, mask, OF_RELU)
    residual = _load(residual_ptr, pid_b, offs_t, offs_d, stride_rb, stride_rt, mask)
    row = pid_b * num_tokens + offs_t
    offs_out = row[:, None] * width + offs_d[None, :]
    if tanh_ptr is not None:
        tl.store(tanh_ptr + offs_out, tanh(residual).to(tanh_ptr.dtype.element_ty), mask=mask)
    total += residual

    mean = tl.sum(total, axis=1) / width
    # padded lanes hold 0, which is off the mean: they must not enter the variance
    centered = tl.where(mask, total - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / width + eps)

    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    out = centered * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean, mask=mask_t)
    tl.store(rstd_ptr + row, rstd, mask=mask_t)


@triton.jit(do_not_specialize=["num_tokens"])
def _residual_layer_norm_fwd_wide_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    tanh_ptr,  # of the residual, or None
    stride_xb,
    stride_xt,
    stride_rb,
    stride_rt,
    num_tokens,
    width,
    eps: tl.float32,
    OF_RELU: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """For rows too wide for registers: three loops over the columns, the later two from cache.

    Grid: one program for each row.
    """
    row = tl.program_id(0).to(tl.int64)
    pid_b = row // num_tokens
    offs_t = row % num_tokens + tl.arange(0, 1)
    acc = tl.zeros((1, BLOCK_D), tl.float32)
    for start in range(0, width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = (offs_d < width)[None, :]
        acc += _load_x(x_ptr, pid_b, offs_t, offs_d, stride_xb, stride_xt, mask, OF_RELU)
        acc += _load(residual_ptr, pid_b, offs_t, offs_d, stride_rb, stride_rt, mask)
    mean = tl.sum(acc, axis=1)[:, None] / width

    acc = tl.zeros((1, BLOCK_D), tl.float32)
    for start in range(0, width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = (offs_d < width)[None, :]
        total = _load_x(x_ptr, pid_b, offs_t, offs_d, stride_xb, stride_xt, mask, OF_RELU)
        total += _load(residual_ptr, pid_b, offs_t, offs_d, stride_rb, stride_rt, mask)
        centered = tl.where(mask, total - mean, 0.0)
        acc += centered * centered
    rstd = tl.rsqrt(tl.sum(acc, axis=1)[:, None] / width + eps)

    for start in range(0, width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < width
        mask = mask_d[None, :]
        total = _load_x(x_ptr, pid_b, offs_t, offs_d, stride_xb, stride_xt, mask, OF_RELU)
        residual = _load(residual_ptr, pid_b, offs_t, offs_d, stride_rb, stride_rt, mask)
        offs_out = row * width + offs_d[None, :]
        if tanh_ptr is not None:
            tl.store(tanh_ptr + offs_out, tanh(residual).to(tanh_ptr.dtype.element_ty), mask=mask)
        total += residual
        weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        out = (total - mean) * rstd * weight[None, :] + bias[None, :]
        tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask)
    one = tl.arange(0, 1)[:, None]
    tl.store(mean_ptr + row + one, mean)
    tl.store(rstd_ptr + row + one, rstd)


@triton.jit(do_not_specialize=["num_tokens"])
def _residual_layer_norm_bwd_means_kernel(
    dout_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    means_ptr,
    stride_yb,
    stride_yt,
    stride_xb,
    stride_xt,
    stride_rb,
    stride_rt,
    num_tokens,
    width,
    OF_RELU: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The two means over a row that dx needs, for rows too wide for registers. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    pid_b = row // num_tokens
    offs_t = row % num_tokens + tl.arange(0, 1)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    sum_g = tl.zeros((1, BLOCK_D), tl.float32)
    sum_gn = tl.zeros((1, BLOCK_D), tl.float32)
    sum_n = tl.zeros((1, BLOCK_D), tl.float32)
    for start in range(0, width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < width
        mask = mask_d[None, :]
        dout = _load(dout_ptr, pid_b, offs_t, offs_d, stride_yb, stride_yt, mask)
        total = _load_x(x_ptr, pid_b, offs_t, offs_d, stride_xb, stride_xt, mask, OF_RELU)
        total += _load(residual_ptr, pid_b, offs_t, offs_d, stride_rb, stride_rt, mask)
        weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        g = dout * weight[None, :]
        sum_g += g
        normalised = tl.where(mask, (total - mean) * rstd, 0.0)
        sum_gn += g * normalised
        sum_n += normalised
    mean_g, mean_gn = _means(sum_g, sum_gn, sum_n, width)
    means_ptrs = means_ptr + 2 * row + tl.arange(0, 1)[:, None]
    tl.store(means_ptrs, mean_g)
    tl.store(means_ptrs + 1, mean_gn)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks_t", "num_blocks"])
def _residual_layer_norm_bwd_kernel(
    dout_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    means_ptr,
    dx_ptr,
    partials_ptr,
    dtanh_ptr,  # (B, T, D) contiguous, or None
    dresidual_ptr,  # the same
    total_ptr,  # of the residual, or None where it is dx
    stride_yb,
    stride_yt,
    stride_xb,
    stride_xt,
    stride_rb,
    stride_rt,
    num_tokens,
    num_blocks_t,
    num_blocks,
    width,
    OF_RELU: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DPARAMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid: (number of partial sums, column blocks).

    Program p takes the row blocks p, p + P, p + 2 P, ... of its columns and keeps the sums for
    dweight and dbias: partials (2, P, D). All columns are one block unless HAS_MEANS. Of
    NUM_STAGES one is computed with while the next row blocks are on their way. With a gradient of
    the residual alone NEEDS_DX holds.
    """
    pid = tl.program_id(0)
    num_partials = tl.num_programs(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < width
    if NEEDS_DX:
        weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for block in tl.range(pid, num_blocks, num_partials, num_stages=NUM_STAGES):
        pid_b, offs_t, mask_t = _rows(block, num_tokens, num_blocks_t, BLOCK_T)
        row = pid_b * num_tokens + offs_t
        mask = mask_t[:, None] & mask_d[None, :]
        dout = _load(dout_ptr, pid_b, offs_t, offs_d, stride_yb, stride_yt, mask)
        x = _load_x(x_ptr, pid_b, offs_t, offs_d, stride_xb, stride_xt, mask, OF_RELU)
        residual = _load(residual_ptr, pid_b, offs_t, offs_d, stride_rb, stride_rt, mask)
        total = x + residual
        mean = tl.load(mean_ptr + row, mask=mask_t, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=mask_t, other=0.0)[:, None]
        normalised = tl.where(mask, (total - mean) * rstd, 0.0)
        if NEEDS_DPARAMS:
            dweight += dout * normalised
            dbias += dout
        if NEEDS_DX:
            g = dout * weight
            if HAS_MEANS:
                mean_g = tl.load(means_ptr + 2 * row, mask=mask_t, other=0.0)[:, None]
                mean_gn = tl.load(means_ptr + 2 * row + 1, mask=mask_t, other=0.0)[:, None]
            else:
                mean_g, mean_gn = _means(g, g * normalised, normalised, width)
            dx = rstd * (g - mean_g - normalised * mean_gn)
            offs = row[:, None] * width + offs_d[None, :]
            if total_ptr is not None:
                of_residual = dx
                if dtanh_ptr is not None:
                    of_tanh = tanh(residual)
                    dtanh = tl.load(dtanh_ptr + offs, mask=mask, other=0.0).to(tl.float32)
                    of_residual += dtanh * (1.0 - of_tanh * of_tanh)
                    dresidual = tl.load(dresidual_ptr + offs, mask=mask, other=0.0)
                    of_residual += dresidual.to(tl.float32)
                tl.store(total_ptr + offs, of_residual.to(total_ptr.dtype.element_ty), mask=mask)
            if OF_RELU:
                dx = tl.where(x <= 0.0, 0.0, dx)
            tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if NEEDS_DPARAMS:
        partials_ptrs = partials_ptr + pid.to(tl.int64) * width + offs_d
        tl.store(partials_ptrs, tl.sum(dweight, axis=0), mask=mask_d)
        partials_ptrs += num_partials.to(tl.int64) * width
        tl.store(partials_ptrs, tl.sum(dbias, axis=0), mask=mask_d)


def residual_layer_norm_forward(
    x: Tensor,  # (B, T, D)
    residual: Tensor,  # (B, T, D)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`."""
    return _forward(x, residual, weight, bias, eps)[:3]


def residual_layer_norm_and_tanh_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`."""
    return _forward(x, residual, weight, bias, eps, with_tanh=True)


def residual_layer_norm_of_relu_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`."""
    return _forward(x, residual, weight, bias, eps, of_relu=True)[:3]


def _forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    with_tanh: bool = False,
    of_relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    x, residual, weight, bias = map(launch.last_contiguous, (x, residual, weight, bias))
    batch, num_tokens, width = x.shape
    out = x.new_empty(x.shape)
    mean = x.new_empty((batch, num_tokens), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    of_residual = residual.new_empty(residual.shape) if with_tanh else None
    if out.numel() == 0:
        return out, mean, rstd, of_residual
    inputs = (x, residual, weight, bias)
    launches = launch.launches("residual_layer_norm", inputs, eps, with_tanh, of_relu)

    def choice() -> tables.Config | None:
        return tables.residual_layer_norm(launch.target_of(x), width, backward=False)

    def wide_arguments() -> launch.Arguments:
        wide = tables.residual_layer_norm_wide(launch.target_of(x))
        constants = {
            "OF_RELU": of_relu,
            "BLOCK_D": wide.block_cols,
            "num_warps": wide.num_warps,
        }
        return (
            (batch * num_tokens,),
            (*launch.all_row_strides(x, residual), num_tokens, width, eps),
            constants,
        )

    def arguments() -> launch.Arguments:
        num_blocks_t = triton.cdiv(num_tokens, config.block_rows)
        constants = {
            "OF_RELU": of_relu,
            "BLOCK_T": config.block_rows,
            "BLOCK_D": config.block_cols,
            "num_warps": config.num_warps,
        }
        scalars = (*launch.all_row_strides(x, residual), num_tokens, num_blocks_t, width, eps)
        return (batch * num_blocks_t,), scalars, constants

    tensors = (*inputs, out, mean, rstd, of_residual)
    config = launches.once(choice)
    if config is None:
        launches.run(_residual_layer_norm_fwd_wide_kernel, tensors, wide_arguments)
    else:
        launches.run(_residual_layer_norm_fwd_kernel, tensors, arguments)
    return out, mean, rstd, of_residual


def residual_layer_norm_backward(
    dout: Tensor,  # (B, T, D)
    x: Tensor,  # (B, T, D)
    residual: Tensor,  # (B, T, D)
    weight: Tensor,  # (D,)
    mean: Tensor,  # (B, T)
    rstd: Tensor,  # (B, T)
    needs_dx: bool,
    needs_dparams: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`."""
    dx_dtype = x.dtype if x.dtype == residual.dtype else torch.float32
    dx = x.new_empty(x.shape if needs_dx else 0, dtype=dx_dtype)
    inputs = (dout, x, residual, weight, mean, rstd)
    return dx, *_backward(inputs, needs_dparams, dx)


def residual_layer_norm_and_tanh_backward(
    dout: Tensor,  # (B, T, D)
    x: Tensor,  # (B, T, D)
    residual: Tensor,  # (B, T, D)
    weight: Tensor,  # (D,)
    mean: Tensor,  # (B, T)
    rstd: Tensor,  # (B, T)
    dtanh: Tensor,  # (B, T, D)
    dresidual: Tensor,  # (B, T, D)
    needs_dparams: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`."""
    dx, total = x.new_empty(x.shape), residual.new_empty(residual.shape)
    inputs = (dout, x, residual, weight, mean, rstd)
    of_rows = dtanh.contiguous(), dresidual.contiguous()
    return dx, total, *_backward(inputs, needs_dparams, dx, total, of_rows)


def residual_layer_norm_of_relu_backward(
    dout: Tensor,  # (B, T, D)
    x: Tensor,  # (B, T, D)
    residual: Tensor,  # (B, T, D)
    weight: Tensor,  # (D,)
    mean: Tensor,  # (B, T)
    rstd: Tensor,  # (B, T)
    needs_dparams: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`."""
    dx, total = x.new_empty(x.shape), residual.new_empty(residual.shape)
    inputs = (dout, x, residual, weight, mean, rstd)
    return dx, total, *_backward(inputs, needs_dparams, dx, total, of_relu=True)


def _backward(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    needs_dparams: bool,
    dx: Tensor,
    total: Tensor | None = None,
    of_rows: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    of_relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias. Written to are dx, unless it is empty, and, if it is given,
    ``total``, the residual's gradient.
    """
    dout, x, residual, weight, mean, rstd = inputs
    dout, x, residual, weight = map(launch.last_contiguous, (dout, x, residual, weight))
    mean, rstd = mean.contiguous(), rstd.contiguous()
    batch, num_tokens, width = x.shape
    needs_dx = dx.shape == x.shape
    if x.numel() == 0 or not (needs_dx or needs_dparams):
        dweight, dbias = (weight.new_zeros(width if needs_dparams else 0) for _ in range(2))
        return dweight, dbias

    inputs = (dout, x, residual, weight, mean, rstd)
    options = dx.dtype, needs_dx, needs_dparams, of_relu
    launches = launch.launches("residual_layer_norm_backward", (*inputs, *of_rows), *options)

    def choice() -> tuple[bool, tables.Config, int, int]:
        """Whether rows are wide, the configuration, row blocks of a batch entry, partial sums."""
        target = launch.target_of(x)
        config = tables.residual_layer_norm(target, width, backward=True)
        is_wide = config is None
        if is_wide:
            config = tables.residual_layer_norm_columns(target)
        num_blocks_t = triton.cdiv(num_tokens, config.block_rows)
        num_partials = triton.cdiv(batch * num_blocks_t, _MIN_BLOCKS_PER_PARTIAL)
        return is_wide, config, num_blocks_t, min(num_partials, _MAX_PARTIALS)

    is_wide, config, num_blocks_t, num_partials = launches.once(choice)

    def means_arguments() -> launch.Arguments:
        wide = tables.residual_layer_norm_wide(launch.target_of(x))
        constants = {
            "OF_RELU": of_relu,
            "BLOCK_D": wide.block_cols,
            "num_warps": wide.num_warps,
        }
        return (
            (batch * num_tokens,),
            (*launch.all_row_strides(dout, x, residual), num_tokens, width),
            constants,
        )

    def arguments() -> launch.Arguments:
        constants = {
            "OF_RELU": of_relu,
            "HAS_MEANS": means is not None,
            "NEEDS_DX": needs_dx,
            "NEEDS_DPARAMS": needs_dparams,
            "BLOCK_T": config.block_rows,
            "BLOCK_D": config.block_cols,
            "NUM_STAGES": config.num_stages,
            "num_warps": config.num_warps,
        }
        grid = (num_partials, triton.cdiv(width, config.block_cols))
        sizes = (num_tokens, num_blocks_t, batch * num_blocks_t, width)
        return grid, (*launch.all_row_strides(dout, x, residual), *sizes), constants

    means = partials = None
    if needs_dparams:
        partials = x.new_empty((2, num_partials, width), dtype=torch.float32)
    if needs_dx and is_wide:
        means = x.new_empty((batch, num_tokens, 2), dtype=torch.float32)
        launches.run(_residual_layer_norm_bwd_means_kernel, (*inputs, means), means_arguments)
    tensors = (*inputs, means, dx, partials, *of_rows, total)
    launches.run(_residual_layer_norm_bwd_kernel, tensors, arguments)
    if not needs_dparams:
        return weight.new_empty(0), weight.new_empty(0)
    # two sums, as the results may not share their storage
    dweight, dbias = (partial.sum(0).to(weight.dtype) for partial in partials)
    return dweight, dbias
