"""What a user writes, with the types that a checker has to see: every public name, each result.

test_types.py has it checked by mypy, and runs it, so that the types are the true ones.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import lm2_kernels as lm2
from lm2_kernels import telemetry


def ops() -> None:
    memory = assert_type(lm2.initial_memory(2, 8, 16, dtype=torch.float32), Tensor)
    heads = memory.view(2, 8, 2, 8)
    read = lm2.memory_attention(heads, heads, heads, causal=True, top_k=4, backend="eager")
    assert_type(read, Tensor)
    pair = lm2.memory_update(memory, memory, memory, memory, memory, memory, output="read")
    assert_type(pair, tuple[Tensor, Tensor])
    assert_type(lm2.reference.memory_attention(heads, heads, heads), Tensor)
    assert_type(lm2.reference.memory_update(*[memory] * 5), tuple[Tensor, Tensor])
    assert_type(lm2.reference.pooled_gate(memory, memory[0, 0]), tuple[Tensor, Tensor])
    assert_type(lm2.reference.visible_slots(4, 8, causal=True), Tensor)


def backends() -> None:
    with lm2.use_backend("eager"), lm2.recording() as ran:
        memory = lm2.initial_memory(1, 4)
        lm2.PaperMemory(4, 1)(memory, memory)
    assert_type(ran, list[tuple[str, str]])
    assert_type(lm2.__version__, str)


def layers() -> None:
    x, memory = torch.randn(2, 4, 16), lm2.initial_memory(2, 8, 16)
    paper = lm2.PaperMemory(16, num_heads=2, dropout=0.1, recompute=True, device="cpu")
    assert_type(paper(x, memory), tuple[Tensor, Tensor])
    assert_type(paper(x, memory, slot_offset=4, slot_mask=None), tuple[Tensor, Tensor])
    assert_type(paper.cache_shapes(), dict[str, tuple[int, ...]])
    assert_type(paper.query_proj, nn.Linear)
    release = lm2.ReleaseMemory(16, 2, pooled_gate="prefix", dtype=torch.float32)
    assert_type(release(x, memory), tuple[Tensor, Tensor])
    three = release(x, memory, return_pooled_sum=True)
    assert_type(three, tuple[Tensor, Tensor, Tensor])
    with_sum: bool = len(three) == 3
    assert_type(release(x, memory, return_pooled_sum=with_sum), tuple[Tensor, ...])
    # what nn.Module has is still there
    assert_type(paper.to(torch.float64), lm2.PaperMemory)
    oracle = lm2.reference.paper_memory(x, memory, paper.float().state_dict(), num_heads=2)
    assert_type(oracle, tuple[Tensor, Tensor])


def model(folder: Path) -> None:
    config = lm2.LM2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        memory_slots=8,
        memory_heads=2,
    )
    assert_type(config.num_banks, int)
    assert_type(lm2.LM2Config.published(memory_slots=1024), lm2.LM2Config)
    assert_type(lm2.LM2Config.from_dict({**vars(config)}), lm2.LM2Config)
    language_model = lm2.LM2ForCausalLM(config)
    ids = torch.randint(32, (2, 12))
    output = language_model(ids, labels=ids, bptt_segments=2)
    assert_type(output, lm2.LM2Output)
    assert_type(output.logits, Tensor | None)
    # None where there were no labels, and without memory layers
    assert output.loss is not None and output.memory is not None
    assert_type(output.loss, Tensor)
    assert_type(output.memory.detach(), lm2.MemoryState)
    for layer in language_model.memory_layers():
        assert_type(layer, lm2.PaperMemory | lm2.ReleaseMemory)
        assert_type(layer.num_heads, int)
    out = language_model.generate(ids, max_new_tokens=2, do_sample=True, top_p=0.9)
    assert_type(out, lm2.Generated)
    assert_type(out.sequences, Tensor)
    assert_type(out.memory, lm2.MemoryState)
    language_model.save(folder)
    assert_type(lm2.LM2ForCausalLM.load(folder, device="cpu"), lm2.LM2ForCausalLM)
    assert_type(language_model.eval(), lm2.LM2ForCausalLM)


def states(folder: Path) -> None:
    state = lm2.MemoryState([lm2.initial_memory(2, 8, 16)])
    first = lm2.MemoryState([lm2.initial_memory(1, 8, 16)])
    assert_type(state.banks, tuple[Tensor, ...])
    assert_type(state.batch, int)
    assert_type(state.start, int | None)
    assert_type(state.position, Tensor)
    assert_type(state.reset([0], first), lm2.MemoryState)
    assert_type(state.select(torch.tensor([1, 0])).expand(2), lm2.MemoryState)
    assert_type(state.to("cpu", torch.float64).end_segment(), lm2.MemoryState)
    assert_type(lm2.MemoryState.cat([state, first]), lm2.MemoryState)
    state.save(folder / "state.safetensors")
    assert_type(lm2.MemoryState.load(folder / "state.safetensors"), lm2.MemoryState)


def patching(host: nn.Module) -> None:
    """In a model of transformers."""
    report = lm2.add_memory(host, memory_slots=8, num_heads=2, layers=(1,))
    optimizer = torch.optim.AdamW(report.parameter_groups(lr=1e-3, weight_decay=0.1))
    optimizer.zero_grad()
    assert_type(report.modules, list[str])
    assert_type(report.trainable, int)
    added = lm2.get_memory(host)
    added.carry = True
    added.reset()
    added.detach()
    assert_type(added.state, lm2.MemoryState | None)
    assert_type(added.layers, list[lm2.PaperMemory | lm2.ReleaseMemory])
    report = lm2.remove_memory(host)  # of the same type
    print(report)


def watched(layer: lm2.PaperMemory) -> None:
    with telemetry.watch(layer) as record:
        layer(torch.randn(2, 4, 16), lm2.initial_memory(2, 8, 16))
    assert_type(record, telemetry.Record)
    assert_type(record.summary(), dict[str, float | int | None])
    assert_type(record.segments(), dict[str, list[dict[str, float | None]]])
    assert_type(record.table(by_segment=True), str)


def saved(host: nn.Module, folder: Path) -> None:
    print(lm2.load_memory(host, folder, freeze=False))


def released(host: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """A model of the released code, and its checkpoint."""
    print(lm2.swap_memory(host, backend="auto"))
    assert_type(lm2.release_state_dict(state_dict), dict[str, Tensor])
