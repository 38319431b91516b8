"""A patched model as one graph, and how often it waits for its device."""

import functools

import pytest
import torch
from torch.export import Dim, export

from lm2_kernels import get_memory, swap_memory
from tools.hosts import SLOTS, bare_llama, hosted, llama, new_cache, tokens
from tools.waits import DEVICE, counted

both = pytest.mark.parametrize("formulation", ("paper", "release"))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def _logits(model, ids, **inputs):
    return model(input_ids=ids, **{"use_cache": False, **inputs}).logits


@hosted
@pytest.mark.parametrize(
    "formulation",
    ("paper", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("release", "paper-chunk"))),
)
def test_compiled_in_one_graph(formulation):
    """With and without gradients, and whatever use_cache says; the cache it makes is refused."""
    model, ids = llama(formulation), tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    leaves = [p for p in model.parameters() if p.requires_grad]
    results = []
    for each in (model, compiled):
        logits = _logits(each, ids)
        results.append([logits, *torch.autograd.grad(logits.square().mean(), leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        output = compiled(ids)
        torch.testing.assert_close(output.logits, results[0][0].detach())
        if hasattr(output.past_key_values, "get_seq_length"):
            with pytest.raises(ValueError, match=r"under torch\.compile"):
                model(ids, past_key_values=output.past_key_values)
        # the model is as it was
        assert torch.equal(_logits(model, ids), results[0][0])


@hosted
@pytest.mark.parametrize(
    ("formulation", "strict"),
    [
        ("release", False),
        ("paper", True),
        pytest.param("release-chunk", False, marks=pytest.mark.slow),
        pytest.param("paper", False, marks=pytest.mark.slow),
        pytest.param("release", True, marks=pytest.mark.slow),
    ],
)
def test_exported(formulation, strict):
    """Several segments with any batch; within one, any length."""
    model = llama(formulation).requires_grad_(False)
    # tokens of two slots at least: a size of 1 is a constant
    least = get_memory(model).layers[0].tokens_per_slot + 1
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=least, max=SLOTS)
    cases = [((2, 12), {0: batch}, [(1, 12), (5, 12)])]
    if not strict:
        cases.append(((2, 6), {0: batch, 1: length}, [(3, SLOTS), (2, least)]))
    for size, dynamic, others in cases:
        inputs = {"input_ids": tokens(*size), "use_cache": False}
        options = {
            "strict": strict,
            "dynamic_shapes": {"input_ids": dynamic, "use_cache": None},
        }
        try:
            # some releases of transformers cannot
            export(bare_llama(), (), inputs, **options)
        except Exception as error:
            pytest.skip(f"the host alone cannot be exported: {error}")
        program = export(model, (), inputs, **options)
        for other in (size, *others):
            ids = tokens(*other)
            got = program.module()(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(got, _logits(model, ids))


@hosted
def test_for_onnx_there_are_none_of_our_operators(monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    model, inputs = llama(), {"input_ids": tokens(), "use_cache": False}
    try:
        export(bare_llama(), (), inputs, strict=False)
    except Exception as error:
        pytest.skip(f"the host alone cannot be exported: {error}")
    program = export(model, (), inputs, strict=False)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names and not any("lm2" in name for name in names)


@hosted
@pytest.mark.parametrize("how", ("compile", "export"))
@pytest.mark.parametrize("what", ("attention_mask", "past_key_values"))
def test_what_one_graph_cannot_take_is_refused_in_one_line(what, how):
    model, ids = llama(), tokens()
    if what == "attention_mask":
        inputs = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    else:
        inputs = {"past_key_values": new_cache()}
    with pytest.raises(Exception, match=f"add_memory: .*{what}" if how == "compile" else "."):
        if how == "compile":
            torch.compile(model, fullgraph=True, backend="eager")(ids, **inputs)
        else:
            export(model, (), {"input_ids": ids, **inputs}, strict=False)


@hosted
@pytest.mark.slow
def test_without_fullgraph_all_is_as_before():
    """Masks and caches break the graph, and compute what they do without torch.compile."""
    model, ids = llama(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    compiled = torch.compile(model, backend="aot_eager")
    want = _logits(model, ids, attention_mask=mask)
    got = _logits(compiled, ids, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()])
    cache = new_cache()
    with torch.no_grad():
        pieces = [compiled(p, past_key_values=cache).logits for p in ids.split(7, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), _logits(model, ids))
        got = compiled.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(got, model.generate(ids, max_new_tokens=5, do_sample=False))


# waits for the device


def _waits(model, run, answer):
    """Those that are the package's own, and those of the host beside it."""
    with counted(answer) as waits:
        run(model)
    return [wait for wait in waits if "elsewhere" not in wait]


def _train(model, ids, **inputs):
    model(ids, labels=ids, use_cache=False, **inputs).loss.backward()


@hosted
@both
def test_a_training_step_waits_once_if_it_must(formulation):
    """For values of a mask or of positions that are on the device, together; else not at all."""
    model, ids = llama(formulation).to(DEVICE), tokens().to(DEVICE)
    mask, positions = torch.ones(2, 20, dtype=torch.int64), torch.arange(20)[None]
    there = {"attention_mask": mask.to(DEVICE), "position_ids": positions.to(DEVICE)}
    for inputs, count in (
        ({}, 0),
        ({"attention_mask": mask}, 0),
        ({"attention_mask": there["attention_mask"]}, 1),
        ({"position_ids": there["position_ids"]}, 1),
        (there, 1),
    ):
        run = functools.partial(_train, ids=ids, **inputs)
        assert len(_waits(model, run, answer=20)) == count, list(inputs)
    four = torch.ones(20, 20, dtype=torch.bool).tril()[None, None].expand(2, 1, 20, 20)
    run = functools.partial(_train, ids=ids, attention_mask=four.to(DEVICE))
    assert len(_waits(model, run, answer=20)) == 1


@hosted
@pytest.mark.parametrize("formulation", ("paper", "release", "paper-chunk", "release-all"))
def test_a_decode_step_waits_for_nothing(formulation):
    model, ids = llama(formulation).to(DEVICE), tokens().to(DEVICE)

    @torch.no_grad()
    def decode(model, **inputs):
        cache = new_cache()
        model(ids, past_key_values=cache)
        for step in range(10):
            seen = {name: mask[:, : 21 + step] for name, mask in inputs.items()}
            model(ids[:, :1], past_key_values=cache, **seen)

    assert _waits(model, decode, answer=1) == []
    # a mask on the device: once a step
    mask = torch.ones(2, 30, dtype=torch.int64, device=DEVICE)
    run = functools.partial(decode, attention_mask=mask)
    assert len(_waits(model, run, answer=1)) == 10


def test_a_swapped_layer_waits_for_its_first_mask():
    from patching.test_patching import Host

    model = Host().to(DEVICE)
    swap_memory(model, backend="eager")
    x, mask = torch.ones(2, 12, 12, device=DEVICE), torch.zeros(2, 1, 12, 12, device=DEVICE)
    counts = []
    for _ in range(3):
        run = functools.partial(lambda model: model(x, x, mask)[0].sum().backward())
        counts.append(len(_waits(model, run, answer=1)))
    # two layers
    assert counts == [2, 0, 0]


@hosted
def test_export_takes_no_carry():
    """And leaves nothing of itself in the model."""
    model, ids = llama(), tokens()
    memory = get_memory(model)
    memory.carry = True
    with pytest.raises(NotImplementedError, match="takes no carry"):
        export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    assert memory.state is None
    assert type(model(ids, use_cache=False).logits) is torch.Tensor
