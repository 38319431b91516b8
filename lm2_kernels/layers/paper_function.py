"""``PaperMemory`` as one ``torch.autograd.Function``."""

import itertools
from typing import NamedTuple

from torch import Tensor

from lm2_kernels.backends import call_without_autocast as call
from lm2_kernels.layers import in_cpp
from lm2_kernels.layers.function import (
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
)
from lm2_kernels.linear import linear
from lm2_kernels.unchecked import contiguous_rows

# of the parameters: a weight and a bias of each, which may be None
PROJECTIONS = (
    "query_proj",
    "key_proj",
    "value_proj",
    "output_gate_proj",
    "input_gate_proj",
    "forget_gate_proj",
    "candidate_proj",
)
_TENSORS = ("x", "memory", "slot_mask", "seed")
_TENSORS += tuple(f"{name}.{part}" for name in PROJECTIONS for part in ("weight", "bias"))


class _Kept(NamedTuple):
    """For backward, (B, T, D) but for the rows (B, R, D) and the weights."""

    x: Tensor
    rows: Tensor
    out: Tensor  # what was read
    candidate: Tensor | None  # if it is not what was read
    input_gate: Tensor
    forget_gate: Tensor
    output_gate: Tensor
    query_weight: Tensor
    key_weight: Tensor
    value_weight: Tensor
    output_weight: Tensor
    input_weight: Tensor
    forget_weight: Tensor
    candidate_weight: Tensor | None


_CANDIDATE = PROJECTIONS.index("candidate_proj")
_WEIGHTS = _Kept._fields.index("query_weight")
_SIZE = len(_Kept._fields)
# whose gradients come through the attention
_READERS = "x memory " + " ".join(
    f"{name}.{part}" for name in PROJECTIONS[:3] for part in ("weight", "bias")
)


class PaperMemoryFunction(LayerFunction):
    """``(options, x, memory, slot_mask, seed, *parameters) -> (output, new_memory)``.

    The parameters are weight and bias of each of :data:`PROJECTIONS`, None where there is none; of
    the options ``more`` is what the layer calls ``output``.

    Keeps by reference x, memory and the parameters, and of its own 7 tensors of x's size (T = N):
    query, key, value, what was read, the three gates before their sigmoid; the attention's
    statistics (8 B H T bytes); with the token candidate that too; with a slot mask the masked
    memory; and copies of x and memory where products take another dtype, as under autocast. Weights
    are cast again.
    """

    uses = places(
        _Kept._fields + Reading._fields,
        _TENSORS,
        x="query_proj.weight input_gate_proj.weight candidate_proj.weight",
        bank="key_proj.weight value_proj.weight",
        query_weight="x",
        input_weight="x",
        candidate_weight="x",
        key_weight="memory",
        value_weight="memory",
        **dict.fromkeys(("query", "key", "value", "by_head", "statistics"), _READERS),
    )

    @staticmethod
    def compute(
        options: Options,
        keeps: bool,
        x: Tensor,
        memory: Tensor,
        slot_mask: Tensor | None,
        seed: Tensor | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensors, Tensors]:
        """Results, and what is kept for backward."""
        if in_cpp.fits(options, (x, memory), parameters):
            results, made = in_cpp.paper_forward(
                *(options, keeps, x, memory, slot_mask, seed, parameters),
                has_candidate=parameters[2 * _CANDIDATE] is not None,
            )
            if not keeps:
                return results, ()
            rows, out, candidate, gates, reading = made
            return results, (x, rows, out, candidate, *gates, *parameters[::2], *reading)
        (wq, bq, wk, bk, wv, bv, wo, bo, wi, bi, wf, bf, wc, bc) = options.operands(*parameters)
        operand = options.operand(x)
        query = linear(operand, wq, bq)
        out, reading = read(options, keeps, query, memory, slot_mask, seed, wk, bk, wv, bv)
        del query
        candidate = None if wc is None else linear(operand, wc, bc).add_(out)
        rows = contiguous_rows(options.rows_of(memory, x.shape[1]))
        gates = linear(operand, wi, bi), linear(out, wf, bf), linear(out, wo, bo)
        written = out if candidate is None else candidate
        shown = _shown(options, out, candidate)
        if not keeps:
            operand = out = None
        output, new_rows = call(
            options.update,
            "memory_update_forward",
            contiguous_rows(x),
            written,
            rows,
            *gates,
            None,
            shown,
            options.more,
            options.tokens_per_slot,
        )
        results = output, options.new_memory(memory, new_rows)
        if not keeps:
            return results, ()
        weights = parameters[::2]
        return results, (operand, rows, out, candidate, *gates, *weights, *reading)

    @staticmethod
    def differentiate(
        options: Options,
        needs: tuple[bool, ...],
        gradients: Tensors,
        saved: Tensors,
    ) -> Tensors:
        """Gradients of all tensors.

        With ``dC, dP, dz_i, dz_f, dz_o, dS`` those of the update (S: what it shows, R unless the
        candidate is a token's) and ``dQ, dK, dV`` those of the attention, given
        ``dR = dC + dS + dz_f Wf + dz_o Wo``::

            dx = doutput + dz_i Wi + dQ Wq (+ dC Wc)
            dmemory = dnew_memory, in the rows written dP, and dK Wk + dV Wv everywhere
        """
        doutput, dnew_memory = gradients
        weights, reading = options.operands(*saved[_WEIGHTS:_SIZE]), Reading(*saved[_SIZE:])
        kept = _Kept(*saved[:_WEIGHTS], *weights)
        needs_x, needs_memory, _, _, *needs_parameters = needs
        pairs = list(zip(needs_parameters[::2], needs_parameters[1::2], strict=True))
        needs_weights = [needs_weight for needs_weight, _ in pairs]
        needs_all = needs_x and needs_weights == [True] * _CANDIDATE + [kept.candidate is not None]
        given = (doutput, dnew_memory, kept.x, reading.bank)
        if needs_all and in_cpp.fits(options, given, weights):
            dx, dmemory, of_linears = in_cpp.paper_backward(
                options, needs_memory, pairs, doutput, dnew_memory, kept, weights, reading
            )
            return dx, dmemory, None, None, *itertools.chain.from_iterable(of_linears)
        of_query, of_key, of_value, of_output, of_input, of_forget, of_candidate = pairs
        needs_dquery = needs_x or any(of_query)
        needs_dkey_value = needs_memory or any(of_key) or any(of_value)
        needs_read = needs_dquery or needs_dkey_value
        has_candidate = kept.candidate is not None

        # no gradient, rather than zeros, for what the outputs that were used do not depend on
        is_written, is_shown = dnew_memory is not None, doutput is not None
        shows_read = is_shown and options.more == "read"
        needs_dcandidate = (is_written or (shows_read and not has_candidate)) and (
            needs_read or (has_candidate and (needs_x or any(of_candidate)))
        )
        needs_drows = needs_memory and (is_written or (is_shown and not shows_read))
        needs_dinput = is_written and (needs_x or any(of_input))
        needs_dforget = is_written and (needs_read or any(of_forget))
        needs_doutput = is_shown and (needs_read or any(of_output))
        needs_dgates = needs_dinput or needs_dforget or needs_doutput
        needs_dshown = has_candidate and shows_read and needs_read
        dnew_rows, dbank = options.gradients_of_rows(dnew_memory, kept.out.shape[1])
        dcandidate = drows = dgates = dshown = None
        if needs_dcandidate or needs_drows or needs_dgates or needs_dshown:
            dcandidate, drows, dgates, _, dshown = call(
                options.update,
                "memory_update_backward",
                doutput,
                dnew_rows,
                kept.out if kept.candidate is None else kept.candidate,
                kept.rows,
                kept.input_gate,
                kept.forget_gate,
                kept.output_gate,
                None,
                _shown(options, kept.out, kept.candidate),
                options.more,
                options.tokens_per_slot,
                needs_dcandidate,
                needs_drows,
                needs_dgates,
                False,
                needs_dshown,
            )
        # From here on (B T, D). A parameter's gradient is formed as soon as it can be, so that what
        # it is formed of need not stay
        shape, out = kept.out.shape, matrix(kept.out)
        x = None if kept.x is None else matrix(kept.x)
        dx = Sum(matrix(doutput) if needs_x and is_shown else None)
        dread = Sum()
        of_parameters = {}
        if has_candidate:
            # before the gradient of what was read is added to this one
            dcandidate = matrix(dcandidate) if needs_dcandidate else None
            of_parameters["candidate_proj"] = of_linear(dcandidate, x, *of_candidate)
            if needs_x:
                dx.add_product(dcandidate, kept.candidate_weight)
        if needs_read:
            dread.add(matrix(dcandidate) if needs_dcandidate else None)
            dread.add(matrix(dshown) if needs_dshown else None)
        del dcandidate, dshown
        if needs_dgates:
            # input, forget and output side by side, of which the last two read what was read
            dim = shape[-1]
            dgates = dgates.view(-1, 3 * dim)
            dinput, dforget, dgate = dgates.split(dim, 1)
            if needs_dinput:
                of_parameters["input_gate_proj"] = of_linear(dinput, x, *of_input)
                if needs_x:
                    dx.add_product(dinput, kept.input_weight)
            if needs_dforget:
                of_parameters["forget_gate_proj"] = of_linear(dforget, out, *of_forget)
            if needs_doutput:
                of_parameters["output_gate_proj"] = of_linear(dgate, out, *of_output)
            if needs_read and needs_dforget and needs_doutput:
                dboth = dgates.narrow(1, dim, 2 * dim)
                dread.add_products(dboth, kept.forget_weight, kept.output_weight)
                del dboth
            elif needs_read and needs_dforget:
                dread.add_product(dforget, kept.forget_weight)
            elif needs_read and needs_doutput:
                dread.add_product(dgate, kept.output_weight)
            del dinput, dforget, dgate
        del dgates
        dkey_value = None
        if dread.total is not None:
            dquery, dkey_value = read_backward(
                options, dread.total, reading, needs_dquery, needs_dkey_value
            )
            del dread
            of_parameters["query_proj"] = of_linear(dquery, x, *of_query)
            if dkey_value is not None:
                dkey, dvalue = dkey_value.chunk(2, -1)
                of_parameters["key_proj"] = of_linear(dkey, reading.bank, *of_key)
                of_parameters["value_proj"] = of_linear(dvalue, reading.bank, *of_value)
                del dkey, dvalue
            if needs_x:
                dx.add_product(dquery, kept.query_weight)
            del dquery
        dmemory = None
        if needs_memory:
            dmemory = of_memory(
                options,
                kept.rows,
                drows if needs_drows else None,
                dbank,
                reading,
                dkey_value,
                kept.key_weight,
                kept.value_weight,
            )
        return (
            None if dx.total is None else dx.total.view(shape),
            dmemory,
            None,
            None,
            *itertools.chain.from_iterable(
                of_parameters.get(name, (None, None)) for name in PROJECTIONS
            ),
        )


def _shown(options: Options, out: Tensor, candidate: Tensor | None) -> Tensor | None:
    """What the output gate shows, where it is not the candidate."""
    return out if candidate is not None and options.more == "read" else None
