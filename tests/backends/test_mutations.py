"""Negative controls: kernels broken on purpose, each of which the common suite must catch.

A mutant is one line of a Triton kernel's source changed, or one expression of a C++ or CUDA kernel.
It is caught when the rule refuses a result, or the interpreter's checks refuse a memory access.
"""

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lm2_kernels import backends, testing
from tools import forms, launches
from tools.emulated_cuda import emulation_reason
from tools.interpreter_sanitizer import SanitizerError
from tools.native import needs_cpp
from tools.native_mutants import NativeMutant, mutated


class Mutant(NamedTuple):
    name: str
    op: str
    old: str
    new: str
    case: testing.Case


def _read(batch, tokens, slots, heads, width, **options) -> testing.Case:
    options = tuple(options.items())
    return testing.Case("memory_attention", batch, tokens, slots, heads, width, options)


def _rows(op: str, batch: int, tokens: int, width: int, **options) -> testing.Case:
    return testing.Case(op, batch, tokens, 0, 0, width, tuple(options.items()))


READ = _read(2, 17, 33, 2, 17, slot_offset=3)
MASKED = _read(1, 17, 19, 1, 16, slot_mask="prefix")
ALL_SLOTS = _read(1, 17, 19, 2, 16, causal=False)
DROPPED = _read(1, 18, 20, 2, 16, dropout_p=0.5)
IN_PARTS = _read(1, 512, 12, 1, 16, causal=False)
RELEASE = _rows("memory_update", 2, 5, 24, gate_bias="segment")
PAPER = _rows("memory_update", 2, 5, 24, output_gate=True)
CHUNKED = _rows("memory_update", 2, 7, 24, tokens_per_slot=3, output_gate=True, read=True)
SLOT_GATES = _rows("memory_update", 2, 7, 24, tokens_per_slot=3, gates="slots", gate_bias="prefix")
NORM = _rows("residual_layer_norm", 2, 5, 24)
SEGMENT = _rows("pooled_gate", 2, 67, 24)
PREFIX = _rows("pooled_gate", 1, 150, 24, prefix=True, num_pooled=5)

MUTANTS = (
    Mutant(
        "scale forgotten",
        "memory_attention",
        "p = tl.exp2((products - finite_max[:, None]) * scale_log2)",
        "p = tl.exp2((products - finite_max[:, None]) * LOG2_E)",
        READ,
    ),
    Mutant(
        "causal bound off by one",
        "memory_attention",
        "visible = slots[None, :] <= last_seen[:, None]",
        "visible = slots[None, :] < last_seen[:, None]",
        READ,
    ),
    Mutant(
        "slots past the end are seen",
        "memory_attention",
        "        mask_n = slots < num_slots\n",
        "        mask_n = slots < num_slots + 1\n",
        ALL_SLOTS,
    ),
    Mutant(
        "padding seen by rows bound past the last slot",
        "memory_attention",
        "last_seen = tl.minimum(slot_offset + offs_t, num_slots - 1)",
        "last_seen = slot_offset + offs_t",
        _read(1, 17, 19, 1, 16, slot_offset=12),
    ),
    Mutant(
        "running sum not rescaled",
        "memory_attention",
        "acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None]",
        "acc = tl.dot(p.to(v.dtype), v, acc",
        _read(1, 40, 150, 1, 16, causal=False),
    ),
    Mutant(
        "rows that see nothing left to the arithmetic",
        "memory_attention",
        "        row_sum = tl.where(sees_any, row_sum, 1.0)\n",
        "",
        MASKED,
    ),
    Mutant(
        "delta forgotten",
        "memory_attention",
        "p * (dp - delta[:, None])",
        "p * dp",
        READ,
    ),
    Mutant(
        "scale forgotten in dK",
        "memory_attention",
        "    dk = dk * scale\n",
        "",
        READ,
    ),
    Mutant(
        "kept probabilities not divided by 1 - p",
        "memory_attention",
        "        factor = factor * keep_scale\n",
        "        factor = factor\n",
        DROPPED,
    ),
    Mutant(
        "another dropout mask in backward",
        "memory_attention",
        "            key_a, key_b = dropout_row_keys(seed, first_score_row + rows)\n",
        "            key_a, key_b = dropout_row_keys(seed, first_score_row + rows + 1)\n",
        DROPPED,
    ),
    Mutant(
        "parts begin at the first token",
        "memory_attention",
        "        first_row = tl.maximum(first_row, part * tokens_per_part)\n",
        "",
        IN_PARTS,
    ),
    Mutant(
        "parts end at the last token",
        "memory_attention",
        "end = tl.minimum((part + 1) * tokens_per_part, num_tokens)",
        "end = num_tokens",
        IN_PARTS,
    ),
    Mutant(
        "parts written to the same place",
        "memory_attention",
        "bank = b * num_parts + part",
        "bank = b * num_parts",
        IN_PARTS,
    ),
    Mutant(
        "input and forget gate swapped",
        "memory_update",
        "proposal = sigmoid(input_gate) * tanh(candidate) + sigmoid(forget_gate) * memory",
        "proposal = sigmoid(forget_gate) * tanh(candidate) + sigmoid(input_gate) * memory",
        RELEASE,
    ),
    Mutant(
        "gate bias of the input gate used twice",
        "memory_update",
        "            gate_bias_ptr + width, pid_b",
        "            gate_bias_ptr, pid_b",
        RELEASE,
    ),
    Mutant(
        "rows past the end written",
        "memory_update",
        "        last = num_tokens\n",
        "        last = num_tokens + 1\n",
        PAPER,
    ),
    Mutant(
        "the last slot has tokens past the end",
        "memory_update",
        "last = tl.minimum(first + tokens_per_slot, num_tokens)",
        "last = first + tokens_per_slot",
        CHUNKED,
    ),
    Mutant(
        "the mean over tokens that are not there",
        "memory_update",
        "_row_sum(total, lost) / (last - first).to(tl.float32)",
        "_row_sum(total, lost) / tokens_per_slot",
        CHUNKED,
    ),
    Mutant(
        "the mean's gradient over tokens that are not there",
        "memory_update",
        "share = share / (last - first).to(tl.float32)",
        "share = share / tokens_per_slot",
        CHUNKED,
    ),
    Mutant(
        "padding proposes",
        "memory_update",
        "_add(total, lost, tl.where(mask, proposal, 0.0))",
        "_add(total, lost, proposal)",
        CHUNKED,
    ),
    Mutant(
        "padding in the gradient of memory",
        "memory_update",
        "_add(total, lost, tl.where(mask, dmemory, 0.0))",
        "_add(total, lost, dmemory)",
        CHUNKED,
    ),
    Mutant(
        "padding in the gradient of a shared gate",
        "memory_update",
        "dforget_gate = tl.where(mask, dforget_gate, 0.0)",
        "dforget_gate = dforget_gate",
        SLOT_GATES,
    ),
    Mutant(
        "the gradients of shared gates in the next slot's place",
        "memory_update",
        "dslot_gates_ptr + row * 2 * width",
        "dslot_gates_ptr + row * 3 * width",
        SLOT_GATES,
    ),
    Mutant(
        "the row of a token of that number",
        "memory_update",
        "memory = _load(memory_ptr, pid_b, pid_t, offs_d",
        "memory = _load(memory_ptr, pid_b, first, offs_d",
        CHUNKED,
    ),
    Mutant(
        "a slot's gate taken for its tokens'",
        "memory_update",
        "    return stride_b, stride, 0\n",
        "    return stride_b, 0, stride\n",
        SLOT_GATES,
    ),
    Mutant(
        "the candidate shown in place of the read",
        "memory_update",
        "shown = _load(read_ptr",
        "shown = _load(candidate_ptr",
        CHUNKED,
    ),
    Mutant(
        "the read's gradient given to the candidate",
        "memory_update",
        "                    dread = doutput * gate\n",
        "                    dcandidate += doutput * gate\n",
        CHUNKED,
    ),
    Mutant(
        "padded lanes in the variance",
        "residual_layer_norm",
        "centered = tl.where(mask, total - mean[:, None], 0.0)",
        "centered = total - mean[:, None]",
        NORM,
    ),
    Mutant(
        "mean over the padded width",
        "residual_layer_norm",
        "mean = tl.sum(total, axis=1) / width",
        "mean = tl.sum(total, axis=1) / BLOCK_D",
        NORM,
    ),
    Mutant(
        "projection of dx on the rows forgotten",
        "residual_layer_norm",
        "dx = rstd * (g - mean_g - normalised * mean_gn)",
        "dx = rstd * (g - mean_g)",
        NORM,
    ),
    Mutant(
        "earlier chunks not added",
        "pooled_gate",
        "        mask_c = offs_c < chunk\n",
        "        mask_c = offs_c < chunk - 1\n",
        PREFIX,
    ),
    Mutant(
        "mean over one token too many",
        "pooled_gate",
        "return (offs_t + 1 + num_pooled)",
        "return (offs_t + 2 + num_pooled)",
        PREFIX,
    ),
    Mutant(
        "relu forgotten in backward",
        "pooled_gate",
        "dactive = tl.where(mask & ~(weight * x <= 0.0), dactive, 0.0)",
        "dactive = tl.where(mask, dactive, 0.0)",
        SEGMENT,
    ),
)


BY_DESCRIPTORS = _read(2, 33, 45, 2, 16, slot_offset=3)
DESCRIPTOR_MUTANTS = (
    Mutant(
        "tiles of the first batch entry",
        "memory_attention",
        "source.load([b.to(tl.int32),",
        "source.load([0,",
        BY_DESCRIPTORS,
    ),
    Mutant(
        "tiles of the first head",
        "memory_attention",
        "h.to(tl.int32), first_row, 0]",
        "0, first_row, 0]",
        BY_DESCRIPTORS,
    ),
    Mutant(
        "tiles cross into the next batch entry",
        "memory_attention",
        "TensorDescriptor(tensor, list(view.shape),",
        "TensorDescriptor(tensor, [*view.shape[:2], 2 * view.shape[2], view.shape[3]],",
        BY_DESCRIPTORS,
    ),
    Mutant(
        "the same values for all slots",
        "memory_attention",
        "value_ptr, b, h, start, slots_64, stride_vn, taken,",
        "value_ptr, b, h, 0, slots_64, stride_vn, taken,",
        BY_DESCRIPTORS,
    ),
    Mutant(
        "the same dout for all tokens",
        "memory_attention",
        "dout_ptr, b, h, start, rows_64,",
        "dout_ptr, b, h, 0, rows_64,",
        BY_DESCRIPTORS,
    ),
    Mutant(
        "queries of another block of dQ",
        "memory_attention",
        "dout_ptr, b, h, first_token, offs_t64,",
        "dout_ptr, b, h, 0, offs_t64,",
        BY_DESCRIPTORS,
    ),
)

KEPT = _read(2, 70, 45, 2, 16, slot_offset=3)
KEPT_MASKED = _read(2, 70, 45, 2, 16, slot_mask="prefix")
RESIDENT_MUTANTS = (
    Mutant(
        "every part begins with the first token",
        "memory_attention",
        "start = tl.program_id(0) % num_parts * tokens_per_part",
        "start = 0",
        KEPT,
    ),
    Mutant(
        "a token too few in every part",
        "memory_attention",
        "tl.minimum(start + tokens_per_part, num_tokens)",
        "tl.minimum(start + tokens_per_part, num_tokens) - 1",
        _read(2, 65, 45, 2, 16),
    ),
    Mutant(
        "the padding of the only tile seen",
        "memory_attention",
        "last_seen = tl.minimum(slot_offset + offs_t, num_slots - 1)",
        "last_seen = slot_offset + offs_t",
        KEPT,
    ),
    Mutant(
        "masked slots seen",
        "memory_attention",
        "            visible = visible & taken[None, :]\n",
        "            visible = visible\n",
        KEPT_MASKED,
    ),
    Mutant(
        "rows that see nothing, and do not know it",
        "memory_attention",
        "first_visible = tl.min(tl.where(taken, slots, 2147483647), 0)",
        "first_visible = 0",
        KEPT_MASKED,
    ),
    Mutant(
        "random numbers of the row before",
        "memory_attention",
        "dropout_row_keys(seed, (b * num_heads + h) * num_tokens + offs_t64)",
        "dropout_row_keys(seed, (b * num_heads + h) * num_tokens + offs_t64 - 1)",
        _read(2, 70, 30, 2, 16, dropout_p=0.5),
    ),
    Mutant(
        "dQ of another row's random numbers",
        "memory_attention",
        "dropout_row_keys(seed, first_score_row + offs_t64)",
        "dropout_row_keys(seed, first_score_row + offs_t64 - 1)",
        _read(2, 70, 30, 2, 16, dropout_p=0.5),
    ),
    Mutant(
        "dQ without the scale",
        "memory_attention",
        "dq = tl.dot(ds.to(k.dtype), k) * scale",
        "dq = tl.dot(ds.to(k.dtype), k)",
        KEPT,
    ),
    Mutant(
        "dQ of the first head's statistics",
        "memory_attention",
        "    statistics_ptr += 2 * first_score_row\n    delta_ptr += first_score_row\n\n    for",
        "    delta_ptr += first_score_row\n\n    for",
        KEPT,
    ),
)
FORM_MUTANTS = {"descriptors": DESCRIPTOR_MUTANTS, "resident": RESIDENT_MUTANTS}


def _mutated(mutant: Mutant, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The op's Triton module with the mutation applied, to it or to what it is made of."""
    package = backends.get("triton")
    parts = ("attention_tiles", "few_slots") if mutant.op == "memory_attention" else ()
    changed = False
    for name in (*parts, mutant.op):
        source = Path(package.__file__).with_name(f"{name}.py").read_text()
        changed |= mutant.old in source
        path = folder / f"{name}.py"
        path.write_text(source.replace(mutant.old, mutant.new))
        spec = importlib.util.spec_from_file_location(f"mutant_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        # for those that come after it
        monkeypatch.setitem(sys.modules, f"{package.__name__}.{name}", module)
        monkeypatch.setattr(package, name, module, raising=False)
    assert changed, "the kernel has changed: give the mutant its new text"
    return module


def _worst_share(case: testing.Case) -> float:
    # float16: its yardstick is less a matter of luck in tiny tensors than float32's
    return max(c.share for c in testing.check_case(case, torch.float16, "triton"))


@pytest.mark.parametrize(
    ("form", "mutant"),
    [
        pytest.param(form, mutant, id=mutant.name)
        for form, mutants in ((None, MUTANTS), *FORM_MUTANTS.items())
        for mutant in mutants
    ],
)
def test_mutant_is_caught(form, mutant, tmp_path, monkeypatch):
    triton = backends.get("triton")
    # a GPU that has room for more than one program of each head: parts end within the tokens
    form = forms.measured(*forms.small(form), wave=8) if form else contextlib.nullcontext()
    with launches.interpreted("sm_90"), form:
        # the kernel as it is passes: it is the mutation that fails
        assert _worst_share(mutant.case) <= 1.0
        module = _mutated(mutant, tmp_path, monkeypatch)
        for direction in ("forward", "backward"):
            name = f"{mutant.op}_{direction}"
            monkeypatch.setattr(triton, name, getattr(module, name))
        with contextlib.suppress(SanitizerError):
            assert _worst_share(mutant.case) > 1.0


# several tokens a slot: more than are added up in one go, and fewer in the last
CHUNK = _rows("memory_update", 2, 43, 24, tokens_per_slot=40, output_gate=True, read=True)
GATES_OF_SLOTS = _rows(
    "memory_update", 2, 13, 24, tokens_per_slot=5, gate_bias="prefix", gates="slots"
)
SHARED_GATES = _rows(
    "memory_update", 2, 8, 40, tokens_per_slot=3, gate_bias="segment", gates="slots"
)
OUTPUT_GATE_OF_SLOTS = _rows(
    "memory_update", 2, 43, 24, tokens_per_slot=40, output_gate=True, gates="slots"
)

# fewer slots than a tile holds, in parts of the tokens and in none
FEW_SLOTS = _read(2, 40, 12, 1, 16, causal=False)
FEW_SEEN = _read(1, 512, 40, 1, 16, slot_offset=3)

CPU = "cpu/memory_update.h"
CUDA = "cuda/memory_update.cu"
ATTENTION = "cuda/memory_attention.cu"
SEVERAL_TILES = _read(1, 20, 100, 1, 16, causal=False)
NATIVE_MUTANTS = (
    NativeMutant(
        "mean over tokens that did not come",
        CPU,
        "divide<S>(updated.row, piece.tokens, updated.row, piece.count)",
        "divide<S>(updated.row, args.tokens_per_slot, updated.row, piece.count)",
        CHUNK,
    ),
    NativeMutant(
        "tokens of the slots before",
        CPU,
        "slot * args.tokens_per_slot",
        "slot",
        GATES_OF_SLOTS,
    ),
    NativeMutant(
        "shared gates doubled",
        CPU,
        "put<S>(buffer + i, gate(i, part), part)",
        "put<S>(buffer + i, gate(i, part) + gate(i, part), part)",
        SHARED_GATES,
    ),
    NativeMutant(
        "another slot's row",
        CPU,
        "row(args.memory, piece.slot, buffers[kMemory])",
        "row(args.memory, piece.slot / 2, buffers[kMemory])",
        GATES_OF_SLOTS,
    ),
    NativeMutant(
        "the last proposal instead of the sum",
        CPU,
        "get<S>(row + i, part) + x",
        "x",
        GATES_OF_SLOTS,
    ),
    NativeMutant(
        "a run that is not added",
        CPU,
        "k >= kRun && ends",
        "k >= kRun && ends && k + 1 < piece.tokens",
        CHUNK,
    ),
    NativeMutant(
        "one run's first token added to the run before",
        CPU,
        "kMany && k >= kRun ? run : total",
        "kMany && k > kRun ? run : total",
        CHUNK,
    ),
    NativeMutant(
        "the gradient of memory not summed",
        CPU,
        "sum.add_to(row, is_first, i, dp, part)",
        "sum.add_to(row, true, i, dp, part)",
        GATES_OF_SLOTS,
    ),
    NativeMutant(
        "the gradient of a shared gate not summed",
        CPU,
        "add_to(sum, k % kRun == 0, i, get<S>(row + i, part), part)",
        "add_to(sum, true, i, get<S>(row + i, part), part)",
        GATES_OF_SLOTS,
    ),
    NativeMutant(
        "the input gate's gradient for the forget gate",
        CPU,
        "gate_sums[gate].add(k, of_gates[gate], piece)",
        "gate_sums[gate].add(k, of_gates[0], piece)",
        GATES_OF_SLOTS,
    ),
    NativeMutant(
        "the gradients of shared gates in the next slot's place",
        CPU,
        "gates * (piece.row_offset(args) - piece.column) + column",
        "2 * (piece.row_offset(args) - piece.column) + column",
        OUTPUT_GATE_OF_SLOTS,
    ),
    NativeMutant(
        "the gradient of the mean not divided",
        CPU,
        "divide<S>(dnew, piece.tokens, buffers[0], piece.count)",
        "divide<S>(dnew, 1, buffers[0], piece.count)",
        CHUNK,
    ),
    NativeMutant(
        "the gradient of read goes to the candidate",
        CPU,
        "put<S>(dread.row + i, dshown, part)",
        "dc = dc + dshown, put<S>(dread.row + i, S::zero(), part)",
        CHUNK,
    ),
    NativeMutant(
        "the candidate shown instead of read",
        CPU,
        "row(args.read, piece.first_token + k, buffers[kRead])",
        "candidate",
        CHUNK,
    ),
    NativeMutant(
        "a sigmoid taken once although the bias is the token's",
        CPU,
        "view.row_stride == 0 && bias.row_stride == 0",
        "view.row_stride == 0",
        GATES_OF_SLOTS,
    ),
    NativeMutant(
        "the gates of a slot's first token for all",
        CPU,
        "k * from.row_stride",
        "0 * from.row_stride",
        CHUNK,
    ),
    NativeMutant(
        "mean over tokens that did not come",
        CUDA,
        "row[0] /= static_cast<float>(share.tokens)",
        "row[0] /= static_cast<float>(args.tokens_per_slot)",
        CHUNK,
    ),
    NativeMutant(
        "tokens of the slots before",
        CUDA,
        "slot * args.tokens_per_slot",
        "slot",
        GATES_OF_SLOTS,
    ),
    NativeMutant(
        "the other threads of a column left out",
        CUDA,
        "x[s] += parts[s][i * columns + threadIdx.x]",
        "x[s] += 0.0f",
        GATES_OF_SLOTS,
    ),
    NativeMutant(
        "the other threads' sums of memory in place of the gates'",
        CUDA,
        "x[s] += parts[s][i * columns + threadIdx.x]",
        "x[s] += parts[0][i * columns + threadIdx.x]",
        GATES_OF_SLOTS,
    ),
    NativeMutant(
        "the input gate's gradient for the forget gate",
        CUDA,
        "own[2] = dforget",
        "own[2] = dinput",
        GATES_OF_SLOTS,
    ),
    NativeMutant(
        "the gradients of shared gates in the next one's place",
        CUDA,
        "row[gate * args.width] = sums[1 + gate]",
        "row[gate * args.width] = sums[gate]",
        OUTPUT_GATE_OF_SLOTS,
    ),
    NativeMutant(
        "the last of the tokens loaded together instead of their sum",
        CUDA,
        "part[s] = j == 0 ? own[s] : part[s] + own[s]",
        "part[s] = own[s]",
        CHUNK,
    ),
    NativeMutant(
        "the last tokens instead of the sum",
        CUDA,
        "sum[s] = total",
        "sum[s] = part[s]",
        CHUNK,
    ),
    NativeMutant(
        "the gradient of the mean not divided",
        CUDA,
        "dnew /= static_cast<float>(share.tokens)",
        "dnew /= 1.0f",
        CHUNK,
    ),
    NativeMutant(
        "the gradient of read goes to the candidate",
        CUDA,
        "args.read ? dread : dcandidate",
        "dcandidate",
        CHUNK,
    ),
    NativeMutant(
        "the candidate shown instead of read",
        CUDA,
        "activation(args.read)",
        "candidate",
        CHUNK,
    ),
    NativeMutant(
        "the gates of a slot's first token for all",
        CUDA,
        "k * view.row_stride + column",
        "0 * view.row_stride + column",
        CHUNK,
    ),
    NativeMutant(
        "parts begin at the first token",
        ATTENTION,
        "part * job.part_tokens",
        "0 * part",
        IN_PARTS,
    ),
    NativeMutant(
        "parts end at the last token",
        ATTENTION,
        "smaller(begin + job.part_tokens, args.tokens)",
        "args.tokens",
        IN_PARTS,
    ),
    NativeMutant(
        "parts begin where their slots are first seen",
        ATTENTION,
        "larger(begin, (first - args.slot_offset) / kOther * kOther)",
        "larger(0, (first - args.slot_offset) / kOther * kOther)",
        FEW_SEEN,
    ),
    NativeMutant(
        "parts written to the same place",
        ATTENTION,
        "b * parts + part",
        "b * parts",
        IN_PARTS,
    ),
    NativeMutant(
        "the last part not added",
        ATTENTION,
        "part < parts",
        "part + 1 < parts",
        IN_PARTS,
    ),
    NativeMutant(
        "the parts of the first batch entry",
        ATTENTION,
        "index / size * parts * size",
        "0 * parts",
        IN_PARTS._replace(batch=2),
    ),
    NativeMutant(
        "the first part each time",
        ATTENTION,
        "first[part * size]",
        "first[0]",
        IN_PARTS,
    ),
    NativeMutant(
        "a group of slots left out",
        ATTENTION,
        "start == 0 || start < count",
        "start == 0 || start + 7 < count",
        FEW_SLOTS,
    ),
    NativeMutant(
        "rows that nobody loaded",
        ATTENTION,
        "(count_of(tile) + Tile::kUnit - 1) / Tile::kUnit * Tile::kUnit",
        "count_of(tile)",
        FEW_SLOTS,
    ),
    NativeMutant(
        "a group of slots past the last one that is seen",
        ATTENTION,
        "reaches(8 * (n + 1), count)",
        "true",
        _read(1, 20, 32, 1, 16),
    ),
    NativeMutant(
        "a stale stage",
        ATTENTION,
        "stage ^= 1",
        "stage ^= 0",
        SEVERAL_TILES,
    ),
    NativeMutant(
        "the last tile not loaded",
        ATTENTION,
        "tile + kOther < end",
        "tile + 2 * kOther < end",
        SEVERAL_TILES,
    ),
    NativeMutant(
        "a tile a step ahead of its copies",
        ATTENTION,
        "lm2_copies_landed<1>()",
        "lm2_copies_landed<2>()",
        SEVERAL_TILES,
    ),
    NativeMutant(
        "dvalue of what dropout dropped",
        ATTENTION,
        "dp[n][i] = kept",
        "dp[n][i] = p",
        DROPPED,
    ),
    NativeMutant(
        "dkey for dvalue",
        ATTENTION,
        "result[kMerged]",
        "result[0]",
        READ,
    ),
    NativeMutant(
        "the first matrix of two for both",
        ATTENTION,
        "lane / 16 * 8 + lane % 8",
        "lane % 8",
        READ,
    ),
    NativeMutant(
        "fewer warps than the rows need",
        ATTENTION,
        "divide_up(groups, blocks)",
        "divide_up(groups, blocks + 1)",
        FEW_SLOTS,
    ),
)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@needs_cpp
def test_native_mutants_are_caught(target):
    if target == "cuda" and emulation_reason() is not None:
        pytest.skip(emulation_reason())
    for case in {mutant.case for mutant in NATIVE_MUTANTS if mutant.target == target}:
        with mutated(target, NATIVE_MUTANTS, 0):
            assert max(c.share for c in testing.check_case(case, torch.float16, "cpp")) <= 1.0
    survivors = []
    for number, mutant in enumerate(NATIVE_MUTANTS, 1):
        if mutant.target != target:
            continue
        with mutated(target, NATIVE_MUTANTS, number):
            worst = max(c.share for c in testing.check_case(mutant.case, torch.float16, "cpp"))
        if worst <= 1.0:
            survivors.append(mutant.name)
    assert not survivors
