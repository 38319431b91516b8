"""The gated write on a GPU: one pass over the tensors forward, one backward.

The equations are those of :func:`lm2_kernels.reference.memory_update`. Every tensor is read and
written once; the backward recomputes the sigmoids and the tanh from the saved inputs.

Where slots have several tokens (``CHUNKED``), a program owns a slot and walks its tokens, BLOCK_T
at a time: it reads the slot's rows once, and writes one. Else it owns BLOCK_T tokens, each of which
has a row of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm2_kernels.backends.triton import launch, tables
from lm2_kernels.backends.triton.primitives import sigmoid, sigmoid_and_slope, tanh


@triton.jit
def _owned(
    num_tokens,
    tokens_per_slot,
    num_blocks_t,
    width,
    CHUNKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What this program owns: tokens [first, last) of one batch entry, BLOCK_D columns of them.

    They are block ``pid_t``: a slot's tokens, or BLOCK_T.
    """
    # neighbouring programs take neighbouring columns
    num_blocks_d = tl.cdiv(width, BLOCK_D)
    pid = tl.program_id(0)
    pid_d = pid % num_blocks_d
    pid_t = (pid // num_blocks_d) % num_blocks_t
    # 64 bits: batch and row indices meet strides that may be anything
    pid_b = (pid // num_blocks_d // num_blocks_t).to(tl.int64)
    if CHUNKED:
        first = pid_t * tokens_per_slot
        last = tl.minimum(first + tokens_per_slot, num_tokens)
    else:
        first = pid_t * BLOCK_T
        last = num_tokens
    offs_d = (pid_d * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    return pid_b, pid_t.to(tl.int64), first, last, offs_d, offs_d < width


@triton.jit
def _load(ptr, pid_b, offs_t, offs_d, stride_b, stride_t, mask):
    tile = tl.load(ptr + pid_b * stride_b + offs_t * stride_t + offs_d, mask=mask, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _add(total, lost, x):
    """The sum with x, and what was rounded off on the way so far: no sum is one long chain."""
    new = total + x
    of_x = new - total
    return new, lost + ((total - (new - of_x)) + (x - of_x))


@triton.jit
def _row_sum(total, lost):
    """The sum over a block's rows of what :func:`_add` added to each, (1, BLOCK_D)."""
    total = tl.sum(total, axis=0, keep_dims=True)
    lost = tl.sum(lost, axis=0, keep_dims=True)
    # of an infinity it is NaN
    return tl.where(total - total == 0.0, total + lost, total)


_DYNAMIC = ["num_tokens", "tokens_per_slot", "num_blocks_t"]


@triton.jit(do_not_specialize=_DYNAMIC)
def _memory_update_fwd_kernel(
    hidden_ptr,
    candidate_ptr,
    memory_ptr,
    read_ptr,
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
    stride_rb,
    stride_rt,
    stride_ib,
    stride_is,
    stride_it,
    stride_fb,
    stride_fs,
    stride_ft,
    stride_ob,
    stride_os,
    stride_ot,
    stride_bb,
    stride_bs,
    stride_bt,
    num_tokens,
    tokens_per_slot,
    num_blocks_t,
    width,
    HAS_OUTPUT_GATE: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_READ: tl.constexpr,
    SHOWS_MEMORY: tl.constexpr,
    CHUNKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: one program for each (batch, slot or BLOCK_T tokens, BLOCK_D columns)."""
    pid_b, pid_t, first, last, offs_d, mask_d = _owned(
        num_tokens, tokens_per_slot, num_blocks_t, width, CHUNKED, BLOCK_T, BLOCK_D
    )
    if CHUNKED:
        memory = _load(memory_ptr, pid_b, pid_t, offs_d, stride_mb, stride_mt, mask_d)
        input_gate_ptr += pid_t * stride_is
        forget_gate_ptr += pid_t * stride_fs
        if HAS_OUTPUT_GATE:
            output_gate_ptr += pid_t * stride_os
        if HAS_GATE_BIAS:
            gate_bias_ptr += pid_t * stride_bs
        total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        lost = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        num_steps = tl.cdiv(last - first, BLOCK_T)
    else:
        num_steps: tl.constexpr = 1

    for step in range(num_steps):
        offs_t = (first + step * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        mask = (offs_t < last) & mask_d
        hidden = _load(hidden_ptr, pid_b, offs_t, offs_d, stride_hb, stride_ht, mask)
        candidate = _load(candidate_ptr, pid_b, offs_t, offs_d, stride_cb, stride_ct, mask)
        if not CHUNKED:
            memory = _load(memory_ptr, pid_b, offs_t, offs_d, stride_mb, stride_mt, mask)
        input_gate = _load(input_gate_ptr, pid_b, offs_t, offs_d, stride_ib, stride_it, mask)
        forget_gate = _load(forget_gate_ptr, pid_b, offs_t, offs_d, stride_fb, stride_ft, mask)
        if HAS_GATE_BIAS:
            input_gate += _load(gate_bias_ptr, pid_b, offs_t, offs_d, stride_bb, stride_bt, mask)
            forget_gate += _load(
                gate_bias_ptr + width, pid_b, offs_t, offs_d, stride_bb, stride_bt, mask
            )

        proposal = sigmoid(input_gate) * tanh(candidate) + sigmoid(forget_gate) * memory
        if HAS_OUTPUT_GATE:
            output_gate = _load(output_gate_ptr, pid_b, offs_t, offs_d, stride_ob, stride_ot, mask)
            if SHOWS_MEMORY:
                shown = memory
            elif HAS_READ:
                shown = _load(read_ptr, pid_b, offs_t, offs_d, stride_rb, stride_rt, mask)
            else:
                shown = candidate
            output = hidden + sigmoid(output_gate) * shown
        else:
            output = hidden + proposal

        offs = (pid_b * num_tokens + offs_t) * width + offs_d
        tl.store(output_ptr + offs, output.to(output_ptr.dtype.element_ty), mask=mask)
        if CHUNKED:
            # tokens past the slot's last one would propose half of memory
            total, lost = _add(total, lost, tl.where(mask, proposal, 0.0))
        else:
            dtype = new_memory_ptr.dtype.element_ty
            tl.store(new_memory_ptr + offs, proposal.to(dtype), mask=mask)

    if CHUNKED:
        mean = _row_sum(total, lost) / (last - first).to(tl.float32)
        offs = (pid_b * num_blocks_t + pid_t) * width + offs_d
        tl.store(new_memory_ptr + offs, mean.to(new_memory_ptr.dtype.element_ty), mask=mask_d)


@triton.jit(do_not_specialize=_DYNAMIC)
def _memory_update_bwd_kernel(
    doutput_ptr,
    dnew_memory_ptr,
    candidate_ptr,
    memory_ptr,
    read_ptr,
    input_gate_ptr,
    forget_gate_ptr,
    output_gate_ptr,
    gate_bias_ptr,
    dcandidate_ptr,
    dmemory_ptr,
    dgates_ptr,
    dslot_gates_ptr,
    dread_ptr,
    stride_yb,
    stride_yt,
    stride_nb,
    stride_nt,
    stride_cb,
    stride_ct,
    stride_mb,
    stride_mt,
    stride_rb,
    stride_rt,
    stride_ib,
    stride_is,
    stride_it,
    stride_fb,
    stride_fs,
    stride_ft,
    stride_ob,
    stride_os,
    stride_ot,
    stride_bb,
    stride_bs,
    stride_bt,
    num_tokens,
    tokens_per_slot,
    num_blocks_t,
    width,
    HAS_DOUTPUT: tl.constexpr,
    HAS_DNEW_MEMORY: tl.constexpr,
    HAS_OUTPUT_GATE: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_READ: tl.constexpr,
    SHOWS_MEMORY: tl.constexpr,
    NEEDS_DCANDIDATE: tl.constexpr,
    NEEDS_DMEMORY: tl.constexpr,
    NEEDS_DGATES: tl.constexpr,
    NEEDS_DSLOT_GATES: tl.constexpr,
    NEEDS_DREAD: tl.constexpr,
    CHUNKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: one program for each (batch, slot or BLOCK_T tokens, BLOCK_D columns).

    Loads whose value no needed gradient uses are removed by the compiler.
    """
    pid_b, pid_t, first, last, offs_d, mask_d = _owned(
        num_tokens, tokens_per_slot, num_blocks_t, width, CHUNKED, BLOCK_T, BLOCK_D
    )
    if CHUNKED:
        memory = _load(memory_ptr, pid_b, pid_t, offs_d, stride_mb, stride_mt, mask_d)
        if HAS_DNEW_MEMORY:
            # what each token's proposal gets of the mean's gradient
            share = _load(dnew_memory_ptr, pid_b, pid_t, offs_d, stride_nb, stride_nt, mask_d)
            share = share / (last - first).to(tl.float32)
        input_gate_ptr += pid_t * stride_is
        forget_gate_ptr += pid_t * stride_fs
        if HAS_OUTPUT_GATE:
            output_gate_ptr += pid_t * stride_os
        if HAS_GATE_BIAS:
            gate_bias_ptr += pid_t * stride_bs
        total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        lost = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        total_input = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        lost_input = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        total_forget = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        lost_forget = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        total_output = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        lost_output = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        num_steps = tl.cdiv(last - first, BLOCK_T)
    else:
        num_steps: tl.constexpr = 1

    for step in range(num_steps):
        offs_t = (first + step * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        mask = (offs_t < last) & mask_d
        candidate = _load(candidate_ptr, pid_b, offs_t, offs_d, stride_cb, stride_ct, mask)
        if not CHUNKED:
            memory = _load(memory_ptr, pid_b, offs_t, offs_d, stride_mb, stride_mt, mask)
        dcandidate = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        dmemory = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        dinput_gate = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        dforget_gate = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        doutput_gate = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        dread = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)

        if HAS_DOUTPUT:
            doutput = _load(doutput_ptr, pid_b, offs_t, offs_d, stride_yb, stride_yt, mask)
            if HAS_OUTPUT_GATE:
                gate, slope = sigmoid_and_slope(
                    _load(output_gate_ptr, pid_b, offs_t, offs_d, stride_ob, stride_ot, mask)
                )
                if SHOWS_MEMORY:
                    dmemory += doutput * gate
                    doutput_gate = doutput * memory * slope
                elif HAS_READ:
                    read = _load(read_ptr, pid_b, offs_t, offs_d, stride_rb, stride_rt, mask)
                    dread = doutput * gate
                    doutput_gate = doutput * read * slope
                else:
                    dcandidate += doutput * gate
                    doutput_gate = doutput * candidate * slope

        # a gradient that never arrived is not 0 times something, which would be NaN for an infinity
        if HAS_DNEW_MEMORY or (HAS_DOUTPUT and not HAS_OUTPUT_GATE):
            dproposal = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
            if HAS_DNEW_MEMORY:
                if not CHUNKED:
                    share = _load(
                        dnew_memory_ptr, pid_b, offs_t, offs_d, stride_nb, stride_nt, mask
                    )
                dproposal += share
            if HAS_DOUTPUT and not HAS_OUTPUT_GATE:
                dproposal += doutput
            input_gate = _load(input_gate_ptr, pid_b, offs_t, offs_d, stride_ib, stride_it, mask)
            forget_gate = _load(forget_gate_ptr, pid_b, offs_t, offs_d, stride_fb, stride_ft, mask)
            if HAS_GATE_BIAS:
                input_gate += _load(
                    gate_bias_ptr, pid_b, offs_t, offs_d, stride_bb, stride_bt, mask
                )
                forget_gate += _load(
                    gate_bias_ptr + width, pid_b, offs_t, offs_d, stride_bb, stride_bt, mask
                )
            input_gate, input_slope = sigmoid_and_slope(input_gate)
            forget_gate, forget_slope = sigmoid_and_slope(forget_gate)
            update = tanh(candidate)
            dcandidate += dproposal * input_gate * (1.0 - update * update)
            dmemory += dproposal * forget_gate
            dinput_gate = dproposal * update * input_slope
            dforget_gate = dproposal * memory * forget_slope

        row = pid_b * num_tokens + offs_t
        offs = row * width + offs_d
        if NEEDS_DCANDIDATE:
            dtype = dcandidate_ptr.dtype.element_ty
            tl.store(dcandidate_ptr + offs, dcandidate.to(dtype), mask=mask)
        if NEEDS_DREAD:
            tl.store(dread_ptr + offs, dread.to(dread_ptr.dtype.element_ty), mask=mask)
        if NEEDS_DGATES:
            dtype = dgates_ptr.dtype.element_ty
            if HAS_OUTPUT_GATE:
                dgates_ptrs = dgates_ptr + row * 3 * width + offs_d
                tl.store(dgates_ptrs + 2 * width, doutput_gate.to(dtype), mask=mask)
            else:
                dgates_ptrs = dgates_ptr + row * 2 * width + offs_d
            tl.store(dgates_ptrs, dinput_gate.to(dtype), mask=mask)
            tl.store(dgates_ptrs + width, dforget_gate.to(dtype), mask=mask)
        # tokens past the slot's last one have a share of dnew_memory, too
        if NEEDS_DSLOT_GATES:
            dinput_gate = tl.where(mask, dinput_gate, 0.0)
            total_input, lost_input = _add(total_input, lost_input, dinput_gate)
            dforget_gate = tl.where(mask, dforget_gate, 0.0)
            total_forget, lost_forget = _add(total_forget, lost_forget, dforget_gate)
            doutput_gate = tl.where(mask, doutput_gate, 0.0)
            total_output, lost_output = _add(total_output, lost_output, doutput_gate)
        if NEEDS_DMEMORY:
            if CHUNKED:
                total, lost = _add(total, lost, tl.where(mask, dmemory, 0.0))
            else:
                dtype = dmemory_ptr.dtype.element_ty
                tl.store(dmemory_ptr + offs, dmemory.to(dtype), mask=mask)

    row = pid_b * num_blocks_t + pid_t
    if CHUNKED and NEEDS_DMEMORY:
        dmemory_row = _row_sum(total, lost).to(dmemory_ptr.dtype.element_ty)
        tl.store(dmemory_ptr + row * width + offs_d, dmemory_row, mask=mask_d)
    if NEEDS_DSLOT_GATES:
        if HAS_OUTPUT_GATE:
            dslot_gates_ptrs = dslot_gates_ptr + row * 3 * width + offs_d
            doutput_gate_row = _row_sum(total_output, lost_output)
            tl.store(dslot_gates_ptrs + 2 * width, doutput_gate_row, mask=mask_d)
        else:
            dslot_gates_ptrs = dslot_gates_ptr + row * 2 * width + offs_d
        tl.store(dslot_gates_ptrs, _row_sum(total_input, lost_input), mask=mask_d)
        dforget_gate_row = _row_sum(total_forget, lost_forget)
        tl.store(dslot_gates_ptrs + width, dforget_gate_row, mask=mask_d)


def _config(
    tokens: Tensor, tokens_per_slot: int, sums_gates: bool = False
) -> tuple[tables.Config, int, int]:
    """Tile, number of slots or row blocks of a batch entry, number of programs."""
    batch, num_tokens, width = tokens.shape
    target = launch.target_of(tokens)
    if tokens_per_slot > 1:
        num_blocks_t = triton.cdiv(num_tokens, tokens_per_slot)
        config = tables.memory_update_chunked(
            target, batch * num_blocks_t, tokens_per_slot, width, sums_gates
        )
    else:
        config = tables.memory_update(target, num_tokens, width)
        num_blocks_t = triton.cdiv(num_tokens, config.block_rows)
    return config, num_blocks_t, batch * num_blocks_t * triton.cdiv(width, config.block_cols)


# input, forget and output gate, and the gates' bias: the last of a kernel's inputs
_NUM_GATES = 4


def _inputs(
    rows: tuple[Tensor | None, ...], gates: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    return tuple(map(launch.last_contiguous, (*rows, *gates)))


def _strides(inputs: tuple[Tensor | None, ...], num_tokens: int) -> list[int]:
    """As the kernels take them: two of each tensor of rows, three of each gate."""
    rows, gates = inputs[:-_NUM_GATES], inputs[-_NUM_GATES:]
    strides = launch.all_row_strides(*rows)
    return strides + [stride for gate in gates for stride in _gate_strides(gate, num_tokens)]


def _constants(
    config: tables.Config,
    inputs: tuple[Tensor | None, ...],
    read: Tensor | None,
    output: str,
    tokens_per_slot: int,
) -> dict[str, int]:
    """Of both kernels."""
    *_, output_gate, gate_bias = inputs
    return {
        "HAS_OUTPUT_GATE": output_gate is not None,
        "HAS_GATE_BIAS": gate_bias is not None,
        "HAS_READ": read is not None,
        "SHOWS_MEMORY": output == "memory",
        "CHUNKED": tokens_per_slot > 1,
        "BLOCK_T": config.block_rows,
        "BLOCK_D": config.block_cols,
        "num_warps": config.num_warps,
    }


def _gate_strides(gate: Tensor | None, num_tokens: int) -> tuple[int, int, int]:
    """Of a batch entry, a slot and a token: a gate has a row a token, a row a slot, or one."""
    stride_b, stride = launch.row_strides(gate)
    if gate is None or gate.shape[1] == num_tokens:
        return stride_b, 0, stride
    return stride_b, stride, 0


def memory_update_forward(
    hidden: Tensor,  # (B, T, D)
    candidate: Tensor,  # (B, T, D)
    memory: Tensor,  # (B, R, D)
    input_gate: Tensor,  # (B, T or R or 1, D)
    forget_gate: Tensor,  # (B, T or R or 1, D)
    output_gate: Tensor | None,  # (B, T or R or 1, D)
    gate_bias: Tensor | None,  # (B, T or R or 1, 2 * D)
    read: Tensor | None,  # (B, T, D)
    output: str,
    tokens_per_slot: int,
) -> tuple[Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends`."""
    num_tokens, width = hidden.shape[1:]
    inputs = _inputs(
        (hidden, candidate, memory, read), (input_gate, forget_gate, output_gate, gate_bias)
    )
    shown = hidden.new_empty(hidden.shape)
    new_memory = memory.new_empty(memory.shape)
    if shown.numel() == 0:
        return shown, new_memory
    tokens_per_slot = min(tokens_per_slot, num_tokens)

    def arguments() -> launch.Arguments:
        config, num_blocks_t, num_programs = _config(hidden, tokens_per_slot)
        constants = _constants(config, inputs, read, output, tokens_per_slot)
        sizes = (num_tokens, tokens_per_slot, num_blocks_t, width)
        return (num_programs,), (*_strides(inputs, num_tokens), *sizes), constants

    launches = launch.launches("memory_update", inputs, output, tokens_per_slot)
    launches.run(_memory_update_fwd_kernel, (*inputs, shown, new_memory), arguments)
    return shown, new_memory


def memory_update_backward(
    doutput: Tensor | None,  # (B, T, D)
    dnew_memory: Tensor | None,  # (B, R, D)
    candidate: Tensor,  # (B, T, D)
    memory: Tensor,  # (B, R, D)
    input_gate: Tensor,  # (B, T or R or 1, D)
    forget_gate: Tensor,  # (B, T or R or 1, D)
    output_gate: Tensor | None,  # (B, T or R or 1, D)
    gate_bias: Tensor | None,  # (B, T or R or 1, 2 * D)
    read: Tensor | None,  # (B, T, D)
    output: str,
    tokens_per_slot: int,
    needs_dcandidate: bool,
    needs_dmemory: bool,
    needs_dgates: bool,
    needs_dslot_gates: bool,
    needs_dread: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends`."""
    batch, num_tokens, width = candidate.shape
    inputs = _inputs(
        (doutput, dnew_memory, candidate, memory, read),
        (input_gate, forget_gate, output_gate, gate_bias),
    )
    shape = (2 if output_gate is None else 3, width)
    dcandidate = candidate.new_empty(candidate.shape if needs_dcandidate else 0)
    dmemory = memory.new_empty(memory.shape if needs_dmemory else 0)
    dgates = input_gate.new_empty((batch, num_tokens, *shape) if needs_dgates else 0)
    of_slots = (*memory.shape[:2], *shape) if needs_dslot_gates else 0
    dslot_gates = input_gate.new_empty(of_slots, dtype=torch.float32)
    dread = candidate.new_empty(candidate.shape if needs_dread else 0)
    gradients = (dcandidate, dmemory, dgates, dslot_gates, dread)
    if not any(gradient.numel() for gradient in gradients):
        return gradients
    tokens_per_slot = min(tokens_per_slot, num_tokens)
    needs = (needs_dcandidate, needs_dmemory, needs_dgates, needs_dslot_gates, needs_dread)

    def arguments() -> launch.Arguments:
        config, num_blocks_t, num_programs = _config(candidate, tokens_per_slot, needs_dslot_gates)
        constants = {
            "HAS_DOUTPUT": doutput is not None,
            "HAS_DNEW_MEMORY": dnew_memory is not None,
            "NEEDS_DCANDIDATE": needs_dcandidate,
            "NEEDS_DMEMORY": needs_dmemory,
            "NEEDS_DGATES": needs_dgates,
            "NEEDS_DSLOT_GATES": needs_dslot_gates,
            "NEEDS_DREAD": needs_dread,
        }
        constants |= _constants(config, inputs, read, output, tokens_per_slot)
        sizes = (num_tokens, tokens_per_slot, num_blocks_t, width)
        return (num_programs,), (*_strides(inputs, num_tokens), *sizes), constants

    launches = launch.launches("memory_update_backward", inputs, output, tokens_per_slot, needs)
    launches.run(_memory_update_bwd_kernel, (*inputs, *gradients), arguments)
    return gradients
