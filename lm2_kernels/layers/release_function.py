"""``ReleaseMemory`` of one block as one ``torch.autograd.Function``."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from lm2_kernels.backends import call_without_autocast as call
from lm2_kernels.backends.contract import (
    NORM,
    NORM_AND_TANH,
    NORM_OF_RELU,
    accumulation_dtype,
)
from lm2_kernels.chunks import sum_by_slot
from lm2_kernels.layers import in_cpp
from lm2_kernels.layers.function import (
    REST,
    LayerFunction,
    Options,
    Reading,
    Sum,
    Tensors,
    matrix,
    of_linear,
    of_memory,
    places,
    read,
    read_backward,
    sum_of_rows,
    times,
)
from lm2_kernels.linear import linear
from lm2_kernels.state.cache import is_known, read_rows
from lm2_kernels.tanh import tanh
from lm2_kernels.unchecked import contiguous_rows


class ReleaseOptions(NamedTuple):
    """What the paper's layer has not, checked.

    Args:
        prefix: whether the gate pools over the tokens so far.
        num_pooled: how many tokens the pooled sum holds that the layer is given.
        applications: of the shared Linear.
        tanh_dtype: in which the rows' tanh is taken.
        tanh: the backend that was asked for, which says whose tanh that is.
        tanh_by_norm: whether the first norm's backend takes it along instead, in backward too.
        relu_by_norm: whether the second norm's backend takes the MLP's last ReLU.
        first_eps, second_eps: of the LayerNorms.
        norm, pool: the backends of their ops.
    """

    prefix: bool
    num_pooled: int
    applications: int
    tanh_dtype: torch.dtype
    tanh: str
    tanh_by_norm: bool
    relu_by_norm: bool
    first_eps: float
    second_eps: float
    norm: str
    pool: str


class ReleaseParameters(NamedTuple):
    """In the order in which the Function takes them."""

    query_weight: Tensor
    query_bias: Tensor | None
    key_weight: Tensor
    key_bias: Tensor | None
    value_weight: Tensor
    value_bias: Tensor | None
    mlp_weight: Tensor
    mlp_bias: Tensor | None
    pooled_weight: Tensor
    pooled_bias: Tensor | None
    rows_weight: Tensor
    rows_bias: Tensor | None
    candidate_weight: Tensor | None
    candidate_bias: Tensor | None
    first_norm_weight: Tensor
    first_norm_bias: Tensor
    second_norm_weight: Tensor
    second_norm_bias: Tensor
    pool_weight: Tensor
    input_bias: Tensor
    forget_bias: Tensor


# of those weight and bias in turn, which are computed with in one dtype
LINEARS = ReleaseParameters._fields.index("first_norm_weight")


class _Kept(NamedTuple):
    """For backward: (B, T, D) but for the rows (B, R, D), what is pooled, and the parameters."""

    x: Tensor  # as it came, for the pool
    operand: Tensor  # x as products take it
    rows: Tensor
    pooled: Tensor  # (B, 1 or T, D)
    tanh: Tensor | None  # of the rows, unless the norm takes it along
    tanh_operand: Tensor  # the same as products take it
    gates: Tensor  # (B, R, 2 D)
    gate_bias: Tensor  # (B, 1 or T, 2 D)
    out: Tensor  # what was read
    attended: Tensor
    mixed: Tensor  # by the MLP, before its last ReLU if that is the norm's
    candidate: Tensor
    first_mean: Tensor
    first_rstd: Tensor
    second_mean: Tensor
    second_rstd: Tensor
    query_weight: Tensor
    key_weight: Tensor
    value_weight: Tensor
    mlp_weight: Tensor
    pooled_weight: Tensor
    rows_weight: Tensor
    candidate_weight: Tensor | None
    first_norm_weight: Tensor
    second_norm_weight: Tensor
    pool_weight: Tensor


_TENSORS = ("x", "memory", "slot_mask", "seed", "pooled_sum", *ReleaseParameters._fields)
_SIZE = len(_Kept._fields)
_OF_PARAMETERS = tuple(name for name in _Kept._fields if name in ReleaseParameters._fields)
_WEIGHTS = slice(*map(_Kept._fields.index, ("query_weight", "first_norm_weight")))
# whose gradients come through the attention, the norms and the MLP
_READERS = "x memory query_weight query_bias key_weight key_bias value_weight value_bias"
_NORMED = f"{_READERS} first_norm_weight first_norm_bias"
_MIXED = f"{_NORMED} mlp_weight mlp_bias second_norm_weight second_norm_bias"


class ReleaseMemoryFunction(LayerFunction):
    """``(options, x, memory, slot_mask, seed, pooled_sum, *ReleaseParameters) -> (output,
    new_memory, pooled_sum)``.

    Keeps by reference x, memory and the parameters, and of its own, in tensors of x's size (T = N):
    query, key, value, what was read, the attended rows, a result of each application of the shared
    Linear, the candidate, the rows' tanh and the two gates, with the prefix gate its mean and what
    the gates have of it (3); the statistics of attention and norms (8 B T (H + 2) bytes); with a
    slot mask the masked memory; and copies of x and memory where products take another dtype, as
    under autocast, and of the tanh unless a norm takes it again. Weights are cast again.
    """

    uses = places(
        # and what the applications of the shared Linear made, but the last
        (*_Kept._fields, *Reading._fields, REST),
        _TENSORS,
        x="x pooled_sum pool_weight",
        operand="query_weight candidate_weight",
        pooled="pooled_weight",
        tanh="memory",
        tanh_operand="rows_weight",
        bank="key_weight value_weight",
        query_weight="x",
        candidate_weight="x",
        key_weight="memory",
        value_weight="memory",
        rows_weight="memory",
        pooled_weight="x pooled_sum pool_weight",
        **dict.fromkeys(("mlp_weight", REST), f"{_NORMED} mlp_weight mlp_bias"),
        **dict.fromkeys(("query", "key", "value", "by_head", "statistics"), _READERS),
        **dict.fromkeys(("out", "first_mean", "first_rstd"), _NORMED),
        **dict.fromkeys(("attended", "mixed", "second_mean", "second_rstd"), _MIXED),
    )

    @staticmethod
    def compute(
        options: Options,
        keeps: bool,
        x: Tensor,
        memory: Tensor,
        slot_mask: Tensor | None,
        seed: Tensor | None,
        pooled_sum: Tensor | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensors, Tensors]:
        """Results, and what is kept for backward."""
        more = options.more
        if in_cpp.fits(options, (x, memory), parameters):
            results, made, reading, mixed = in_cpp.release_forward(
                options, keeps, x, memory, slot_mask, seed, pooled_sum, parameters
            )
            if not keeps:
                return results, ()
            given = ReleaseParameters(*parameters)
            of_parameters = {name: getattr(given, name) for name in _OF_PARAMETERS}
            # the norm takes the tanh again
            kept = _Kept(x=x, operand=x, tanh=None, **made, **of_parameters)
            return results, (*kept, *reading, *mixed)
        *vectors, input_bias, forget_bias = parameters[LINEARS:]
        vectors = map(contiguous_rows, vectors)
        linears = options.operands(*parameters[:LINEARS])
        p = ReleaseParameters(*linears, *vectors, input_bias, forget_bias)
        operand, dense = options.operand(x), contiguous_rows(x)
        pooled, new_sum = call(
            more.pool,
            "pooled_gate_forward",
            dense,
            p.pool_weight,
            None if pooled_sum is None else contiguous_rows(pooled_sum),
            more.prefix,
            more.num_pooled,
        )
        pooled = options.operand(pooled)
        biases = [bias.expand(x.shape[-1]) for bias in (p.input_bias, p.forget_bias)]
        gate_bias = linear(pooled, p.pooled_weight, p.pooled_bias)
        gate_bias += torch.cat(biases).to(options.dtype)

        rows = contiguous_rows(options.rows_of(memory, x.shape[1]))
        candidate, rows_tanh, of_candidate, after = _candidate(
            options, keeps, operand, memory, rows, slot_mask, seed, p
        )
        if not keeps:
            pooled = operand = None
        # the gates last: what is not kept of the candidate has made room
        gates, of_gates = _gates_of_rows(options, keeps, rows, rows_tanh, p)
        del rows_tanh
        output, new_rows = call(
            options.update,
            "memory_update_forward",
            dense,
            candidate,
            rows,
            *gates.chunk(2, dim=-1),
            None,
            gate_bias,
            None,
            "read",
            options.tokens_per_slot,
        )
        results = output, options.new_memory(memory, new_rows), new_sum
        if not keeps:
            return results, ()
        kept = _Kept(
            dense,
            operand,
            rows,
            pooled,
            *of_gates,
            gate_bias,
            *of_candidate,
            *parameters[:LINEARS:2],
            p.first_norm_weight,
            p.second_norm_weight,
            p.pool_weight,
        )
        return results, (*kept, *after)

    @staticmethod
    def differentiate(
        options: Options,
        needs: tuple[bool, ...],
        gradients: Tensors,
        saved: Tensors,
    ) -> Tensors:
        """Gradients of all tensors.

        The chain of the update, ``LayerNorm2(C1 + h)``, the ReLU MLP, ``LayerNorm1(P + R)`` and the
        attention. With ``dz`` (B, R, 2 D) the update's for the gates, the rows have a share
        ``dt = dz Wm (1 - tanh(P)^2)``, and what is pooled the sum of dz over tokens::

            dx = doutput + dQ Wq (+ dC Wc) + the pool's
            dmemory = dnew_memory, in the rows written dP + dC1 + dt, and dK Wk + dV Wv everywhere
        """
        doutput, dnew_memory, dnew_sum = gradients
        after = _SIZE + len(Reading._fields)
        weights, reading = options.operands(*saved[_WEIGHTS]), Reading(*saved[_SIZE:after])
        kept = _Kept(*saved[: _WEIGHTS.start], *weights, *saved[_WEIGHTS.stop : _SIZE])
        c, more = options.tokens_per_slot, options.more
        needs_x, needs_memory, _, _, needs_sum, *needs_parameters = needs
        need = ReleaseParameters(*needs_parameters)
        # candidate_weight last
        *needs_weights, needs_last = need[:LINEARS:2]
        has_candidate = kept.candidate_weight is not None
        needs_all = needs_x and all((*needs_weights, *need[LINEARS:])) and not needs_sum
        some = dnew_memory if doutput is None else doutput
        given = (some, kept.x, kept.operand, reading.bank)
        if needs_all and needs_last == has_candidate and in_cpp.fits(options, given, weights):
            pairs = list(zip(need[:LINEARS:2], need[1:LINEARS:2], strict=True))
            dx, dmemory, of_linears, others = in_cpp.release_backward(
                options, needs_memory, pairs, gradients, kept, weights, reading, saved[after:]
            )
            of_parameters = *itertools.chain.from_iterable(of_linears), *others
            return dx, dmemory, None, None, None, *of_parameters
        of = ReleaseParameters(*(None,) * len(need))._asdict()

        # of tokens (B T, D)
        dx = Sum(None if doutput is None or not needs_x else matrix(doutput))
        operand = None if kept.operand is None else matrix(kept.operand)
        drows, dkey_value = Sum(), None
        needs_pool = needs_x or needs_sum or need.pool_weight
        needs_gate_bias = (
            needs_pool
            or need.pooled_weight
            or need.pooled_bias
            or need.input_bias
            or need.forget_bias
        )
        needs_gates = needs_memory or need.rows_weight or need.rows_bias
        needs_dquery = needs_x or need.query_weight or need.query_bias
        needs_dkey_value = needs_memory or any(need[2:6])
        needs_read = needs_dquery or needs_dkey_value
        needs_first = needs_read or need.first_norm_weight or need.first_norm_bias
        needs_mlp = needs_first or need.mlp_weight or need.mlp_bias
        needs_second = needs_mlp or need.second_norm_weight or need.second_norm_bias
        needs_candidate = needs_second or need.candidate_weight or need.candidate_bias
        dpooled = None
        dnew_rows, dbank = options.gradients_of_rows(dnew_memory, kept.candidate.shape[1])
        if doutput is not None or dnew_memory is not None:
            num_tokens, num_rows = kept.candidate.shape[1], kept.rows.shape[1]
            own_rows = num_rows != num_tokens
            own_bias = own_rows and kept.gate_bias.shape[1] != num_tokens
            input_gate, forget_gate = kept.gates.chunk(2, dim=-1)
            of_tokens = (needs_gates and not own_rows) or (needs_gate_bias and not own_bias)
            of_slots = (needs_gates and own_rows) or (needs_gate_bias and own_bias)
            # over all of them, the gradient of either bias
            one_sum = needs_gate_bias and own_rows == own_bias
            dtanh = None
            dcandidate, dwritten, by_token, by_slot, _ = call(
                options.update,
                "memory_update_backward",
                doutput,
                dnew_rows,
                kept.candidate,
                kept.rows,
                input_gate,
                forget_gate,
                None,
                kept.gate_bias,
                None,
                "read",
                c,
                needs_candidate,
                needs_memory,
                of_tokens,
                of_slots,
                False,
            )
            if needs_memory:
                drows.add(dwritten)
            if needs_gates:
                dgates = (by_slot if own_rows else by_token).flatten(2).to(options.dtype)
                of["rows_weight"], of["rows_bias"] = of_linear(
                    dgates, kept.tanh_operand, need.rows_weight, need.rows_bias and not one_sum
                )
                if needs_memory:
                    dtanh = times(dgates, kept.rows_weight)
                    if not more.tanh_by_norm:
                        dtanh = dtanh.to(kept.tanh.dtype)
                        drows.add(torch.ops.aten.tanh_backward(dtanh, kept.tanh))
                        dtanh = None
            if needs_gate_bias:
                dgates = (by_slot if own_bias else by_token).flatten(2)
                if kept.gate_bias.shape[1] != dgates.shape[1]:
                    dgates = dgates.sum(dim=1, keepdim=True, dtype=accumulation_dtype(dgates))
                dbiases, dgates = sum_of_rows(dgates), dgates.to(options.dtype)
                of["pooled_weight"], _ = of_linear(dgates, kept.pooled, need.pooled_weight, False)
                of["pooled_bias"] = dbiases if need.pooled_bias else None
                if need.rows_bias and one_sum:
                    of["rows_bias"] = dbiases.clone() if need.pooled_bias else dbiases
                dinput, dforget = dbiases.chunk(2)
                of["input_bias"] = dinput.sum(0, True) if need.input_bias else None
                of["forget_bias"] = dforget.sum(0, True) if need.forget_bias else None
                dpooled = times(dgates, kept.pooled_weight) if needs_pool else None
            dgates = by_token = by_slot = None
            if needs_candidate:
                dcandidate = matrix(dcandidate)
                if needs_x and kept.candidate_weight is not None:
                    dx.add_product(dcandidate, kept.candidate_weight)
                of["candidate_weight"], of["candidate_bias"] = of_linear(
                    dcandidate, operand, need.candidate_weight, need.candidate_bias
                )
            if needs_second:
                of_summands, of["second_norm_weight"], of["second_norm_bias"] = _norm_backward(
                    more.norm,
                    NORM_OF_RELU if more.relu_by_norm else NORM,
                    dcandidate.view(kept.candidate.shape),
                    (kept.mixed, kept.attended),
                    (kept.second_norm_weight, kept.second_mean, kept.second_rstd),
                    () if more.relu_by_norm else (needs_mlp,),
                    need.second_norm_weight,
                    need.second_norm_bias,
                )
                del dcandidate
            if needs_mlp:
                mixed = tuple(map(matrix, (kept.attended, *saved[after:], kept.mixed)))
                dattended, of["mlp_weight"], of["mlp_bias"] = _mlp_backward(
                    tuple(map(matrix, of_summands)),
                    mixed,
                    kept.mlp_weight,
                    needs_first,
                    need.mlp_weight,
                    need.mlp_bias,
                )
            if needs_first:
                normed = with_rows(kept.out, kept.rows, c)
                of_summands, of["first_norm_weight"], of["first_norm_bias"] = _norm_backward(
                    more.norm,
                    NORM if dtanh is None else NORM_AND_TANH,
                    dattended.view(normed[0].shape),
                    normed,
                    (kept.first_norm_weight, kept.first_mean, kept.first_rstd),
                    (needs_read,) if dtanh is None else (dtanh, drows.total),
                    need.first_norm_weight,
                    need.first_norm_bias,
                )
                del dtanh
            if needs_read:
                dread = of_summands[0]
                if len(of_summands) > 1:
                    # all of it
                    drows = Sum(of_summands[1])
                elif needs_memory:
                    # not the first of the sum, which would be written to: it is read again
                    drows.add(sum_by_slot(dread.view(kept.out.shape), c))
                dread = options.operand(dread)
                dquery, dkey_value = read_backward(
                    options, dread, reading, needs_dquery, needs_dkey_value
                )
                if needs_x:
                    dx.add_product(dquery, kept.query_weight)
                of["query_weight"], of["query_bias"] = of_linear(
                    dquery, operand, need.query_weight, need.query_bias
                )
                del dread, dquery
                if dkey_value is not None:
                    dkey, dvalue = dkey_value.chunk(2, -1)
                    of["key_weight"], of["key_bias"] = of_linear(
                        dkey, reading.bank, need.key_weight, need.key_bias
                    )
                    of["value_weight"], of["value_bias"] = of_linear(
                        dvalue, reading.bank, need.value_weight, need.value_bias
                    )
                    del dkey, dvalue
        dpooled_sum = None
        if needs_pool and (dpooled is not None or dnew_sum is not None):
            of_x, dweight, dpooled_sum = call(
                more.pool,
                "pooled_gate_backward",
                None if dpooled is None else dpooled.to(kept.x.dtype),
                dnew_sum,
                kept.x,
                kept.pool_weight,
                more.prefix,
                more.num_pooled,
                needs_x,
                need.pool_weight,
                needs_sum,
            )
            if needs_x:
                dx.add(matrix(of_x))
            of["pool_weight"] = dweight if need.pool_weight else None
        dmemory = None
        if needs_memory:
            dmemory = of_memory(
                options,
                kept.rows,
                drows.total,
                dbank,
                reading,
                dkey_value,
                kept.key_weight,
                kept.value_weight,
            )
        return (
            None if dx.total is None else dx.total.view(kept.candidate.shape),
            dmemory,
            None,
            None,
            dpooled_sum if needs_sum else None,
            *of.values(),
        )


def _candidate(
    options: Options,
    keeps: bool,
    operand: Tensor,
    memory: Tensor,
    rows: Tensor,
    slot_mask: Tensor | None,
    seed: Tensor | None,
    p: ReleaseParameters,
) -> tuple[Tensor, Tensor | None, Tensors, Tensors]:
    """The candidate, the rows' tanh if the norm takes it along, and what is kept for backward: from
    ``out`` on in :class:`_Kept`, and behind that. The rest makes room for what comes next.
    """
    more = options.more
    query = linear(operand, p.query_weight, p.query_bias)
    out, reading = read(options, keeps, query, memory, slot_mask, seed, *p[2:6])
    del query
    attended, first_mean, first_rstd, *rows_tanh = call(
        more.norm,
        f"{NORM_AND_TANH if more.tanh_by_norm else NORM}_forward",
        *with_rows(out, rows, options.tokens_per_slot),
        p.first_norm_weight,
        p.first_norm_bias,
        more.first_eps,
    )
    rows_tanh = rows_tanh[0] if rows_tanh else None
    attended = attended.view(out.shape)
    if not keeps:
        del out
    mixed = [attended]
    for left in reversed(range(more.applications)):
        relu = left > 0 or not more.relu_by_norm
        mixed.append(linear(mixed[-1], p.mlp_weight, p.mlp_bias, relu=relu))
        if not keeps:
            del mixed[0]
    candidate, second_mean, second_rstd = call(
        more.norm,
        f"{NORM_OF_RELU if more.relu_by_norm else NORM}_forward",
        mixed[-1],
        attended,
        p.second_norm_weight,
        p.second_norm_bias,
        more.second_eps,
    )
    if not keeps:
        del attended, mixed
    if p.candidate_weight is not None:
        candidate = linear(operand, p.candidate_weight, p.candidate_bias).add_(candidate)
    if not keeps:
        return candidate, rows_tanh, (), ()
    statistics = first_mean, first_rstd, second_mean, second_rstd
    kept = out, attended, mixed[-1], candidate, *statistics
    return candidate, rows_tanh, kept, (*reading, *mixed[1:-1])


def _gates_of_rows(
    options: Options,
    keeps: bool,
    rows: Tensor,
    rows_tanh: Tensor | None,
    p: ReleaseParameters,
) -> tuple[Tensor, Tensors]:
    """The gates' part of the rows, and what is kept of it for backward."""
    if rows_tanh is None:
        cast_rows = rows.to(options.more.tanh_dtype) if options.is_cast else rows
        rows_tanh = tanh(cast_rows, options.more.tanh)
    operand = options.operand(rows_tanh)
    if options.more.tanh_by_norm:
        # its backward takes the tanh again
        rows_tanh = None
    gates = linear(operand, p.rows_weight, p.rows_bias)
    return gates, (rows_tanh, operand, gates) if keeps else ()


def with_rows(out: Tensor, rows: Tensor, tokens_per_slot: int) -> tuple[Tensor, Tensor]:
    """What was read, and the rows of the tokens that read it."""
    batch, num_tokens, width = out.shape
    if tokens_per_slot == 1:
        return out, rows
    if is_known(num_tokens == tokens_per_slot * rows.shape[1]):
        # a batch of slots, whose rows are not copied for each token
        own = out.reshape(batch * rows.shape[1], tokens_per_slot, width)
        return own, rows.flatten(0, 1)[:, None].expand(own.shape)
    return out, read_rows(rows.repeat_interleave(tokens_per_slot, dim=1), 0, num_tokens)


def _norm_backward(
    backend: str,
    norm: str,
    dout: Tensor,
    summands: tuple[Tensor, Tensor],
    known: tuple[Tensor, Tensor, Tensor],  # weight, mean, rstd
    more: tuple[Tensor | bool, ...],
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """Gradients of the summands, or one of both, of weight and of bias."""
    needs_dparams = needs_dweight or needs_dbias
    *of_summands, dweight, dbias = call(
        backend, f"{norm}_backward", dout, *summands, *known, *more, needs_dparams
    )
    return tuple(of_summands), dweight if needs_dweight else None, dbias if needs_dbias else None


def _mlp_backward(
    of_summands: tuple[Tensor, ...],
    mixed: Tensors,
    weight: Tensor,
    needs_dattended: bool,
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the MLP's input, of weight and of bias.

    Given those of the summands of the norm behind: one, of the MLP's result and of its input, or
    two, of the result before its last ReLU and of its input. The latter is overwritten.
    """
    total, dweight, dbias, dresult = Sum(), Sum(), Sum(), of_summands[0]
    total.add(of_summands[-1])
    is_after_relu = len(of_summands) == 1
    for given, result in zip(reversed(mixed[:-1]), reversed(mixed[1:]), strict=True):
        if is_after_relu:
            dresult = torch.ops.aten.threshold_backward(dresult, result, 0)
        is_after_relu = True
        one, other = of_linear(dresult, given, needs_dweight, needs_dbias)
        dweight.add(one)
        dbias.add(other)
        if given is not mixed[0]:
            dresult = times(dresult, weight)
        elif needs_dattended:
            total.add_product(dresult, weight)
    return total.total, dweight.total, dbias.total
