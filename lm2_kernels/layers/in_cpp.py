"""A layer's pass over CPU tensors as one call of the compiled backend (csrc/cpu/layers.h).

It computes what :mod:`paper_function` and :mod:`release_function` do with its kernels, forward bit
for bit: at small sizes their Python takes a tenth of the time, and at the smallest most of it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lm2_kernels import backends
from lm2_kernels.backends import cpp, cpu_products
from lm2_kernels.layers.function import Options, Reading, Tensors, bank_of, of_bank, with_read

# off: a layer's parts are called one by one, as they are where anybody records them
enabled = True
_DTYPES = (torch.float32, torch.float64)
# by what was asked for and sizes; they are few, but where lengths vary
_ways: dict[tuple, int] = {}
_MOST_WAYS = 4096


def fits(options: Options, *dense: Tensor | None) -> bool:
    """Whether these options are those of a layer in one call, and it can be one now: where all
    ``dense`` tensors are there, neither empty nor with gaps, and nobody records what is called.
    """
    return (
        options.in_cpp
        and enabled
        and not backends.is_recording()
        and all([t is not None and t.is_contiguous() and t.numel() > 0 for t in dense])
    )


def is_possible(device_type: str, dtype: torch.dtype, names: set[str]) -> bool:
    """Whether a layer on this type of device, which computes in this dtype, may be one call if its
    ops have these backends.
    """
    return (
        device_type == "cpu"
        and names == {"cpp"}
        and dtype in _DTYPES
        and cpp.has("release_layer_forward")
    )


def _reading(options: Options, x: Tensor, bank: Tensor, num_pooled: int) -> tuple:
    """Options of reading, the products' first."""
    how, ways = options.read, 0
    if options.dtype == torch.float32:
        batch, num_tokens, dim = x.shape
        sizes = batch * num_tokens, batch * bank.shape[1], num_pooled, dim
        key = cpu_products.float32_request(), sizes
        ways = _ways.get(key)
        if ways is None:
            if len(_ways) >= _MOST_WAYS:
                _ways.clear()
            ways = _ways[key] = _ways_of(*sizes)
    return (
        ways,
        how.num_heads,
        how.causal,
        how.slot_offset,
        how.scale,
        how.top_k,
        how.dropout,
    )


def _ways_of(tokens: int, slots: int, num_pooled: int, dim: int) -> int:
    """Which products go to oneDNN, as csrc/cpu/layers.h numbers them."""
    ways = 0
    for place, product in enumerate(
        (
            # x W^T, dy W, dy^T x
            (tokens, dim, dim, True, False),
            (slots, dim, dim, True, False),
            (tokens, dim, 2 * dim, True, False),
            (num_pooled, dim, 2 * dim, True, False),
            (tokens, dim, dim, True, True),
            (slots, dim, dim, True, True),
            (tokens, 2 * dim, dim, True, True),
            (num_pooled, 2 * dim, dim, True, True),
            (dim, tokens, dim, False, True),
            (dim, slots, dim, False, True),
            (2 * dim, tokens, dim, False, True),
            (2 * dim, num_pooled, dim, False, True),
        )
    ):
        ways |= cpu_products.is_by_onednn(*product) << place
    return ways


def _take(found: Iterator[Tensor], needs: tuple[bool, bool]) -> Tensors:
    """The next gradients of a Linear: of its weight, and of its bias if there is one."""
    return tuple(next(found) if needed else None for needed in needs)


def _of_memory(
    options: Options,
    found: Iterator[Tensor],
    rows: Tensor,
    dbank: Tensor | None,
    reading: Reading,
    needs_memory: bool,
    is_whole: bool,
) -> Tensor | None:
    """The next gradient, a memory's, or what it is made of."""
    if not needs_memory:
        return None
    if is_whole:
        return next(found)
    total = of_bank(options, rows, next(found), dbank)
    return with_read(options, rows, total, next(found), reading.slot_mask)


def paper_forward(
    options: Options,
    keeps: bool,
    x: Tensor,
    memory: Tensor,
    slot_mask: Tensor | None,
    seed: Tensor | None,
    parameters: Tensors,
) -> tuple[Tensors, Tensors]:
    """What ``PaperMemoryFunction.compute`` gives."""
    rows = options.rows_of(memory, x.shape[1])
    bank, slot_mask = bank_of(options, x.shape[1], memory, slot_mask)
    output, new_rows, *made = cpp.call(
        "paper_layer_forward",
        x,
        rows,
        bank,
        slot_mask,
        seed,
        parameters,
        *_reading(options, x, bank, 0),
        options.more,
        keeps,
    )
    results = output, options.new_memory(memory, new_rows)
    if not keeps:
        return results, ()
    candidate = made.pop(1) if parameters[12] is not None else None
    out, *gates, query, key, value, by_head, statistics = made
    reading = Reading(bank, query, key, value, by_head, statistics, slot_mask, seed)
    return results, (x, rows, out, candidate, *gates, *parameters[::2], *reading)


def paper_backward(
    options: Options,
    needs: tuple[bool, ...],
    gradients: Tensors,
    kept: tuple[Tensor | None, ...],
    reading: Reading,
) -> Tensors:
    """What ``PaperMemoryFunction.differentiate`` gives, of tensors that all need a gradient but for
    the memory perhaps, and of results that both have one.
    """
    doutput, dnew_memory = gradients
    x, rows, out, candidate, *gates = kept[:7]
    weights, needs_memory = kept[7:], needs[1]
    dnew_rows, dbank = options.gradients_of_rows(dnew_memory, x.shape[1])
    is_whole = rows.shape[1] == options.read.num_slots and reading.slot_mask is None
    pairs = list(zip(needs[4::2], needs[5::2], strict=True))
    found = iter(
        cpp.call(
            "paper_layer_backward",
            doutput,
            dnew_rows,
            x,
            rows,
            out,
            candidate,
            *gates,
            *reading,
            weights,
            [has_bias for _, has_bias in pairs],
            *_reading(options, x, reading.bank, 0),
            options.more,
            needs_memory,
            is_whole,
        )
    )
    dx = next(found)
    dmemory = _of_memory(options, found, rows, dbank, reading, needs_memory, is_whole)
    # query, key, value, candidate, input, forget and output gate
    of = {place: _take(found, pairs[place]) for place in (0, 1, 2, 6, 4, 5, 3)}
    return dx.view(x.shape), dmemory, None, None, *(t for place in range(7) for t in of[place])


def release_forward(
    options: Options,
    keeps: bool,
    x: Tensor,
    memory: Tensor,
    slot_mask: Tensor | None,
    seed: Tensor | None,
    pooled_sum: Tensor | None,
    parameters: Tensors,
) -> tuple[Tensors, Tensors]:
    """What ``ReleaseMemoryFunction.compute`` gives."""
    more, batch, num_tokens = options.more, *x.shape[:2]
    rows = options.rows_of(memory, num_tokens)
    bank, slot_mask = bank_of(options, num_tokens, memory, slot_mask)
    output, new_rows, new_sum, *made = cpp.call(
        "release_layer_forward",
        x,
        rows,
        bank,
        slot_mask,
        seed,
        pooled_sum,
        parameters,
        *_reading(options, x, bank, batch * num_tokens if more.prefix else batch),
        more.prefix,
        more.num_pooled,
        more.applications,
        more.first_eps,
        more.second_eps,
        keeps,
    )
    results = output, options.new_memory(memory, new_rows), new_sum
    if not keeps:
        return results, ()
    pooled, *of_rows = made[:4]
    query, key, value, by_head, statistics, *mixed = made[12:]
    reading = Reading(bank, query, key, value, by_head, statistics, slot_mask, seed)
    weights = (*parameters[:14:2], parameters[14], parameters[16], parameters[18])
    # the norm takes the tanh again
    kept = (x, x, rows, pooled, None, *of_rows, *made[4:12], *weights)
    return results, (*kept, *reading, *mixed)


def release_backward(
    options: Options,
    needs: tuple[bool, ...],
    gradients: Tensors,
    kept: tuple[Tensor | None, ...],
    reading: Reading,
    mixed: Tensors,
) -> Tensors:
    """What ``ReleaseMemoryFunction.differentiate`` gives, of tensors that all need a gradient but
    for the pooled sum, and the memory perhaps; output or new memory has one.
    """
    doutput, dnew_memory, dnew_sum = gradients
    more, needs_memory = options.more, needs[1]
    x, _, rows, pooled, _, rows_tanh, gates, gate_bias, _, attended, last, candidate = kept[:12]
    statistics, weights, norms = kept[12:16], kept[16:23], kept[23:]
    dnew_rows, dbank = options.gradients_of_rows(dnew_memory, x.shape[1])
    is_whole = rows.shape[1] == options.read.num_slots and reading.slot_mask is None
    pairs = list(zip(needs[5:19:2], needs[6:19:2], strict=True))
    found = iter(
        cpp.call(
            "release_layer_backward",
            doutput,
            dnew_rows,
            dnew_sum,
            x,
            rows,
            pooled,
            rows_tanh,
            gates,
            gate_bias,
            (attended, *mixed, last),
            candidate,
            statistics,
            *reading,
            weights,
            [has_bias for _, has_bias in pairs],
            *norms,
            *_reading(options, x, reading.bank, pooled.numel() // pooled.shape[-1]),
            more.prefix,
            more.num_pooled,
            needs_memory,
            is_whole,
        )
    )
    dx = next(found)
    dmemory = _of_memory(options, found, rows, dbank, reading, needs_memory, is_whole)
    of_linears = [_take(found, pair) for pair in pairs]
    of_parameters = *(gradient for pair in of_linears for gradient in pair), *found
    return dx.view(x.shape), dmemory, None, None, None, *of_parameters
