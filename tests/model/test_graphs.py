"""LM2ForCausalLM as one graph: torch.export, for ONNX too."""

import copy
import io
import pickle

import pytest
import torch
from torch.export import Dim, export

from lm2_kernels import MemoryState
from tools.models import KINDS, random_ids, small_model
from tools.rounding import assert_round_off

# between them they have both formulations, both flows and both write rules
KINDS = KINDS[::3]
every_kind = pytest.mark.parametrize(("formulation", "flow"), KINDS)
# strict export traces Python, which takes its time
everyday = pytest.mark.parametrize(
    ("formulation", "flow", "strict"),
    [
        (*KINDS[1], False),
        (*KINDS[2], False),
        pytest.param(*KINDS[0], False, marks=pytest.mark.slow),
        pytest.param(*KINDS[0], True, marks=pytest.mark.slow),
        pytest.param(*KINDS[1], True, marks=pytest.mark.slow),
    ],
)


@pytest.fixture(autouse=True)
def _fresh():
    # what earlier tests compiled counts towards the limit of recompilations
    torch._dynamo.reset()


def _model(formulation="paper", flow="depth", **options):
    options = {"num_hidden_layers": 1, "initializer_range": 0.2, **options}
    return small_model(formulation=formulation, flow=flow, **options).eval()


def _check(module, model, ids, **inputs):
    got, want = module(ids, **inputs), model(ids, **inputs)
    if want.logits is not None:
        assert_round_off(got.logits, want.logits)
    if want.loss is not None:
        assert_round_off(got.loss, want.loss)
    assert got.memory.position.tolist() == want.memory.position.tolist()
    for a, b in zip(got.memory.banks, want.memory.banks, strict=True):
        assert_round_off(a, b)


@everyday
def test_export(formulation, flow, strict):
    """Several segments, saved and loaded; with a state, with labels, and within a segment."""
    model, ids = _model(formulation, flow), random_ids(2, 9)
    program = export(model, (ids,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    _check(torch.export.load(file).module(), model, ids)
    state = model(random_ids(2, 6, seed=3)).memory
    for inputs in ({"memory": state}, {"labels": ids.clone()}):
        program = export(model, (ids,), inputs, strict=strict)
        _check(program.module(), model, ids, **inputs)
    more = random_ids(2, 5)
    program = export(model, (ids,), {"use_cache": True}, strict=strict)
    _check(program.module(), model, ids, use_cache=True)
    first = program.module()(ids, use_cache=True).memory
    want = model(torch.cat([ids, more], dim=1)).logits[:, 9:]
    assert_round_off(model(more, memory=first).logits, want)


@everyday
def test_export_for_any_batch_and_length_of_a_segment(formulation, flow, strict):
    model = _model(formulation, flow)
    # tokens of two slots at least: a size of 1 is a constant
    least = model.config.tokens_per_slot + 1
    sizes = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=least, max=6)}
    program = export(model, (random_ids(2, 5),), strict=strict, dynamic_shapes={"input_ids": sizes})
    for batch, length in ((2, 4), (1, least), (5, 6), (3, 5)):
        _check(program.module(), model, random_ids(batch, length))
    # more than a segment: so many as there were
    program = export(
        model, (random_ids(2, 15),), strict=strict, dynamic_shapes={"input_ids": {0: sizes[0]}}
    )
    for batch in (1, 5):
        _check(program.module(), model, random_ids(batch, 15))


@pytest.mark.parametrize("how", ("compile", "export", "strict export"))
def test_a_mask_is_refused_in_one_line(how):
    model, ids = _model(), random_ids(2, 9)
    mask = torch.ones_like(ids)
    text = "LM2ForCausalLM: .*take no attention_mask, whose values say how the tokens lie"
    with pytest.raises(Exception, match=text):
        if how == "compile":
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            compiled(ids, attention_mask=mask)
        else:
            export(model, (ids,), {"attention_mask": mask}, strict=how != "export")


def test_strict_export_of_one_segment():
    model, ids = _model(), random_ids(2, 5)
    _check(export(model, (ids,), strict=True).module(), model, ids)


@pytest.mark.slow
def test_a_mask_breaks_the_graph():
    """Without fullgraph all is computed as without torch.compile."""
    model, ids = _model(), random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    compiled = torch.compile(model, backend="eager")
    want = model(ids, attention_mask=mask).logits
    assert_round_off(compiled(ids, attention_mask=mask).logits, want)


@pytest.mark.parametrize("formulation", ("paper", "release"))
def test_for_onnx_there_are_none_of_our_operators(formulation, monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    model, ids = _model(formulation), random_ids(2, 9)
    program = export(model, (ids,), strict=False)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names and not any("lm2" in name for name in names)
    _check(program.module(), model, ids)


def test_onnx():
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, ids = _model().float(), random_ids(2, 9)
    program = torch.onnx.export(model, (ids,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    got = session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), model(ids).logits)


def _by_torch(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_kind
@pytest.mark.parametrize("how", ("pickle", "deepcopy", "weights_only", "file", "tree"))
@pytest.mark.parametrize("sizes", ((9,), (12,), (4, 5)))
def test_states_are_copied_in_mid_segment(formulation, flow, how, sizes, tmp_path):
    """What goes on from a copy is bit for bit what goes on from the state."""
    model, ids = _model(formulation, flow), random_ids(2, 21)

    def through_tree(state):
        leaves, structure = torch.utils._pytree.tree_flatten(state)
        return torch.utils._pytree.tree_unflatten(leaves, structure)

    def through_file(state):
        state.save(tmp_path / "state")
        return MemoryState.load(tmp_path / "state")

    copied = {
        "pickle": lambda state: pickle.loads(pickle.dumps(state)),
        "deepcopy": copy.deepcopy,
        "weights_only": _by_torch,
        "file": through_file,
        "tree": through_tree,
    }[how]
    with torch.no_grad():
        state, done = None, 0
        for size in sizes:
            state = model(ids[:, done : done + size], memory=state, use_cache=True).memory
            done += size
        # rows at different places, in mid-chunk too
        state = MemoryState.cat([state.select([0]), model(ids[1:, :4], use_cache=True).memory])
        other, steps = copied(state), []
        assert other.position.tolist() == state.position.tolist()
        for each in (other, state):
            logits, memory = [], each
            for token in ids[:, done:].split(1, dim=1):
                output = model(token, memory=memory, use_cache=True)
                logits.append(output.logits)
                memory = output.memory
            steps.append(torch.cat(logits, dim=1))
    assert torch.equal(*steps)


def test_a_pickle_of_an_earlier_version_goes_on():
    """It does not say how tokens are bound to slots: by their positions."""
    model, ids = _model(), random_ids(2, 9)
    state = model(ids[:, :4], use_cache=True).memory.detach()
    state.__dict__.pop("_tokens_per_slot")
    for again in (pickle.loads(pickle.dumps(state)), _by_torch(state)):
        assert torch.equal(model(ids, memory=again).logits, model(ids, memory=state).logits)
        assert_round_off(again.end_segment().banks[0], state.banks[0])


def test_outputs_are_copied():
    model, ids = _model(), random_ids(2, 9)
    with torch.no_grad():
        output = model(ids, ids, use_cache=True, return_logits=True)
    for copied in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output), _by_torch(output)):
        assert torch.equal(copied.logits, output.logits)
        assert torch.equal(copied.loss, output.loss)
        assert copied.memory.position.tolist() == output.memory.position.tolist()
