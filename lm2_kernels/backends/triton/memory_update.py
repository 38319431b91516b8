"""The gated write on a GPU: one pass over the tensors forward, one backward.

The equations are those of :func:`lm2_kernels.reference.memory_update`. Every tensor is read and
written once; the backward recomputes the sigmoids and the tanh from the saved inputs.
"""

import triton
import triton.language as tl
from torch import Tensor

from lm2_kernels.backends.triton import launch, tables
from lm2_kernels.backends.triton.primitives import sigmoid, sigmoid_and_slope, tanh


@triton.jit
def _tile(num_tokens, num_blocks_t, width, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """What this program owns: BLOCK_T rows of one batch entry, BLOCK_D columns of them."""
    # neighbouring programs take neighbouring columns
    num_blocks_d = tl.cdiv(width, BLOCK_D)
    pid = tl.program_id(0)
    pid_d = pid % num_blocks_d
    pid_t = (pid // num_blocks_d) % num_blocks_t
    # 64 bits: batch and row indices meet strides that may be anything
    pid_b = (pid // num_blocks_d // num_blocks_t).to(tl.int64)
    offs_t = (pid_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_t < num_tokens)[:, None] & (offs_d < width)[None, :]
    return pid_b, offs_t[:, None], offs_d[None, :], mask


@triton.jit
def _load(ptr, pid_b, offs_t, offs_d, stride_b, stride_t, mask):
    tile = tl.load(ptr + pid_b * stride_b + offs_t * stride_t + offs_d, mask=mask, other=0.0)
    return tile.to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks_t"])
def _memory_update_fwd_kernel(
    hidden_ptr,
    candidate_ptr,
    memory_ptr,
    input_gate_ptr,
    forget_gate_ptr,
    output_gate_ptr,
    gate_bias_ptr,
    output_ptr,
    new_memory_ptr,
    stride_hb,
    stride_ht,
    stride_cb,
    stride_ct,
    stride_mb,
    stride_mt,
    stride_ib,
    stride_it,
    stride_fb,
    stride_ft,
    stride_ob,
    stride_ot,
    stride_bb,
    stride_bt,
    num_tokens,
    num_blocks_t,
    width,
    HAS_OUTPUT_GATE: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    SHOWS_MEMORY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: one program for each (batch, BLOCK_T rows, BLOCK_D columns)."""
    pid_b, offs_t, offs_d, mask = _tile(num_tokens, num_blocks_t, width, BLOCK_T, BLOCK_D)
    hidden = _load(hidden_ptr, pid_b, offs_t, offs_d, stride_hb, stride_ht, mask)
    candidate = _load(candidate_ptr, pid_b, offs_t, offs_d, stride_cb, stride_ct, mask)
    memory = _load(memory_ptr, pid_b, offs_t, offs_d, stride_mb, stride_mt, mask)
    input_gate = _load(input_gate_ptr, pid_b, offs_t, offs_d, stride_ib, stride_it, mask)
    forget_gate = _load(forget_gate_ptr, pid_b, offs_t, offs_d, stride_fb, stride_ft, mask)
    if HAS_GATE_BIAS:
        input_gate += _load(gate_bias_ptr, pid_b, offs_t, offs_d, stride_bb, stride_bt, mask)
        forget_gate += _load(
            gate_bias_ptr + width, pid_b, offs_t, offs_d, stride_bb, stride_bt, mask
        )

    new_memory = sigmoid(input_gate) * tanh(candidate) + sigmoid(forget_gate) * memory
    if HAS_OUTPUT_GATE:
        output_gate = _load(output_gate_ptr, pid_b, offs_t, offs_d, stride_ob, stride_ot, mask)
        if SHOWS_MEMORY:
            output = hidden + sigmoid(output_gate) * memory
        else:
            output = hidden + sigmoid(output_gate) * candidate
    else:
        output = hidden + new_memory

    offs = (pid_b * num_tokens + offs_t) * width + offs_d
    tl.store(output_ptr + offs, output.to(output_ptr.dtype.element_ty), mask=mask)
    tl.store(new_memory_ptr + offs, new_memory.to(new_memory_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks_t"])
def _memory_update_bwd_kernel(
    doutput_ptr,
    dnew_memory_ptr,
    candidate_ptr,
    memory_ptr,
    input_gate_ptr,
    forget_gate_ptr,
    output_gate_ptr,
    gate_bias_ptr,
    dcandidate_ptr,
    dmemory_ptr,
    dgates_ptr,
    stride_yb,
    stride_yt,
    stride_nb,
    stride_nt,
    stride_cb,
    stride_ct,
    stride_mb,
    stride_mt,
    stride_ib,
    stride_it,
    stride_fb,
    stride_ft,
    stride_ob,
    stride_ot,
    stride_bb,
    stride_bt,
    num_tokens,
    num_blocks_t,
    width,
    HAS_DOUTPUT: tl.constexpr,
    HAS_DNEW_MEMORY: tl.constexpr,
    HAS_OUTPUT_GATE: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    SHOWS_MEMORY: tl.constexpr,
    NEEDS_DCANDIDATE: tl.constexpr,
    NEEDS_DMEMORY: tl.constexpr,
    NEEDS_DGATES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: one program for each (batch, BLOCK_T rows, BLOCK_D columns).

    Loads whose value no needed gradient uses are removed by the compiler.
    """
    pid_b, offs_t, offs_d, mask = _tile(num_tokens, num_blocks_t, width, BLOCK_T, BLOCK_D)
    candidate = _load(candidate_ptr, pid_b, offs_t, offs_d, stride_cb, stride_ct, mask)
    memory = _load(memory_ptr, pid_b, offs_t, offs_d, stride_mb, stride_mt, mask)
    dcandidate = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    dmemory = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    dinput_gate = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    dforget_gate = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    doutput_gate = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)

    if HAS_DOUTPUT:
        doutput = _load(doutput_ptr, pid_b, offs_t, offs_d, stride_yb, stride_yt, mask)
        if HAS_OUTPUT_GATE:
            gate, slope = sigmoid_and_slope(
                _load(output_gate_ptr, pid_b, offs_t, offs_d, stride_ob, stride_ot, mask)
            )
            if SHOWS_MEMORY:
                dmemory += doutput * gate
                doutput_gate = doutput * memory * slope
            else:
                dcandidate += doutput * gate
                doutput_gate = doutput * candidate * slope

    # a gradient that never arrived is not 0 times something, which would be NaN for an infinity
    if HAS_DNEW_MEMORY or (HAS_DOUTPUT and not HAS_OUTPUT_GATE):
        dnew_memory = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        if HAS_DNEW_MEMORY:
            dnew_memory += _load(dnew_memory_ptr, pid_b, offs_t, offs_d, stride_nb, stride_nt, mask)
        if HAS_DOUTPUT and not HAS_OUTPUT_GATE:
            dnew_memory += doutput
        input_gate = _load(input_gate_ptr, pid_b, offs_t, offs_d, stride_ib, stride_it, mask)
        forget_gate = _load(forget_gate_ptr, pid_b, offs_t, offs_d, stride_fb, stride_ft, mask)
        if HAS_GATE_BIAS:
            input_gate += _load(gate_bias_ptr, pid_b, offs_t, offs_d, stride_bb, stride_bt, mask)
            forget_gate += _load(
                gate_bias_ptr + width, pid_b, offs_t, offs_d, stride_bb, stride_bt, mask
            )
        input_gate, input_slope = sigmoid_and_slope(input_gate)
        forget_gate, forget_slope = sigmoid_and_slope(forget_gate)
        update = tanh(candidate)
        dcandidate += dnew_memory * input_gate * (1.0 - update * update)
        dmemory += dnew_memory * forget_gate
        dinput_gate = dnew_memory * update * input_slope
        dforget_gate = dnew_memory * memory * forget_slope

    row = pid_b * num_tokens + offs_t
    offs = row * width + offs_d
    if NEEDS_DCANDIDATE:
        dtype = dcandidate_ptr.dtype.element_ty
        tl.store(dcandidate_ptr + offs, dcandidate.to(dtype), mask=mask)
    if NEEDS_DMEMORY:
        dtype = dmemory_ptr.dtype.element_ty
        tl.store(dmemory_ptr + offs, dmemory.to(dtype), mask=mask)
    if NEEDS_DGATES:
        dtype = dgates_ptr.dtype.element_ty
        if HAS_OUTPUT_GATE:
            dgates_ptrs = dgates_ptr + row * 3 * width + offs_d
            tl.store(dgates_ptrs + 2 * width, doutput_gate.to(dtype), mask=mask)
        else:
            dgates_ptrs = dgates_ptr + row * 2 * width + offs_d
        tl.store(dgates_ptrs, dinput_gate.to(dtype), mask=mask)
        tl.store(dgates_ptrs + width, dforget_gate.to(dtype), mask=mask)


def _config(tensor: Tensor) -> tuple[tables.Config, int, int]:
    """Tile, number of row blocks of a batch entry, number of programs."""
    batch, num_tokens, width = tensor.shape
    config = tables.memory_update(launch.target_of(tensor), num_tokens, width)
    num_blocks_t = triton.cdiv(num_tokens, config.block_rows)
    return config, num_blocks_t, batch * num_blocks_t * triton.cdiv(width, config.block_cols)


def memory_update_forward(
    hidden: Tensor,  # (B, T, D)
    candidate: Tensor,  # (B, T, D)
    memory: Tensor,  # (B, T, D)
    input_gate: Tensor,  # (B, T, D) or (B, 1, D)
    forget_gate: Tensor,  # (B, T, D) or (B, 1, D)
    output_gate: Tensor | None,  # (B, T, D) or (B, 1, D)
    gate_bias: Tensor | None,  # (B, T, 2 * D) or (B, 1, 2 * D)
    output: str,
) -> tuple[Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends`."""
    inputs = [
        launch.last_contiguous(tensor)
        for tensor in (
            hidden,
            candidate,
            memory,
            input_gate,
            forget_gate,
            output_gate,
            gate_bias,
        )
    ]
    shown = hidden.new_empty(hidden.shape)
    new_memory = memory.new_empty(memory.shape)
    if shown.numel() == 0:
        return shown, new_memory
    config, num_blocks_t, num_programs = _config(hidden)
    with launch.device_guard(hidden.device):
        _memory_update_fwd_kernel[(num_programs,)](
            *inputs,
            shown,
            new_memory,
            *(stride for tensor in inputs for stride in launch.row_strides(tensor)),
            hidden.shape[1],
            num_blocks_t,
            hidden.shape[2],
            HAS_OUTPUT_GATE=output_gate is not None,
            HAS_GATE_BIAS=gate_bias is not None,
            SHOWS_MEMORY=output == "memory",
            BLOCK_T=config.block_rows,
            BLOCK_D=config.block_cols,
            num_warps=config.num_warps,
        )
    return shown, new_memory


def memory_update_backward(
    doutput: Tensor | None,  # (B, T, D)
    dnew_memory: Tensor | None,  # (B, T, D)
    candidate: Tensor,  # (B, T, D)
    memory: Tensor,  # (B, T, D)
    input_gate: Tensor,  # (B, T, D) or (B, 1, D)
    forget_gate: Tensor,  # (B, T, D) or (B, 1, D)
    output_gate: Tensor | None,  # (B, T, D) or (B, 1, D)
    gate_bias: Tensor | None,  # (B, T, 2 * D) or (B, 1, 2 * D)
    output: str,
    needs_dcandidate: bool,
    needs_dmemory: bool,
    needs_dgates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends`."""
    inputs = [
        launch.last_contiguous(tensor)
        for tensor in (
            doutput,
            dnew_memory,
            candidate,
            memory,
            input_gate,
            forget_gate,
            output_gate,
            gate_bias,
        )
    ]
    batch, num_tokens, width = candidate.shape
    num_gates = 2 if output_gate is None else 3
    dcandidate = candidate.new_empty(candidate.shape if needs_dcandidate else 0)
    dmemory = memory.new_empty(memory.shape if needs_dmemory else 0)
    dgates = input_gate.new_empty((batch, num_tokens, num_gates, width) if needs_dgates else 0)
    if dcandidate.numel() + dmemory.numel() + dgates.numel() == 0:
        return dcandidate, dmemory, dgates
    config, num_blocks_t, num_programs = _config(candidate)
    with launch.device_guard(candidate.device):
        _memory_update_bwd_kernel[(num_programs,)](
            *inputs,
            dcandidate,
            dmemory,
            dgates,
            *(stride for tensor in inputs for stride in launch.row_strides(tensor)),
            num_tokens,
            num_blocks_t,
            width,
            HAS_DOUTPUT=doutput is not None,
            HAS_DNEW_MEMORY=dnew_memory is not None,
            HAS_OUTPUT_GATE=output_gate is not None,
            HAS_GATE_BIAS=gate_bias is not None,
            SHOWS_MEMORY=output == "memory",
            NEEDS_DCANDIDATE=needs_dcandidate,
            NEEDS_DMEMORY=needs_dmemory,
            NEEDS_DGATES=needs_dgates,
            BLOCK_T=config.block_rows,
            BLOCK_D=config.block_cols,
            num_warps=config.num_warps,
        )
    return dcandidate, dmemory, dgates
