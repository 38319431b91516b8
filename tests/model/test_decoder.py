"""The reference model and its state: parity with the released one, segments, loss, no leaks."""

import copy
import dataclasses
import io
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree

import lm2_kernels as lm2
from lm2_kernels import LM2Config, LM2ForCausalLM, MemoryState, testing
from tools.models import KINDS, SMALL, random_ids, small_model
from tools.native import needs_cpp
from tools.rounding import assert_round_off, assert_rule

GOLDEN = Path(__file__).parents[1] / "data" / "models" / "release_model_s32_l3.safetensors"


def _changed(model, length, position):
    """How much the logits of each token change with the token at a position. (length,)"""
    ids, other = random_ids(1, length), random_ids(1, length)
    other[:, position] = (other[:, position] + 1) % SMALL["vocab_size"]
    return (model(ids).logits - model(other).logits).abs().amax(-1)[0]


every_kind = pytest.mark.parametrize(("formulation", "flow"), KINDS)


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["config"])


def _group(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _released_model(config, backend) -> LM2ForCausalLM:
    names = (f.name for f in dataclasses.fields(LM2Config) if f.name in config)
    sizes = {name: config[name] for name in names}
    return LM2ForCausalLM(
        LM2Config(
            **sizes,
            memory_heads=config["num_mem_heads"],
            formulation="release",
            flow="depth",
            candidate="read",
            pooled_gate="segment",
            backend=backend,
        )
    ).double()


@pytest.mark.parametrize("backend", ("eager", "auto"))
def test_released_model(golden, backend):
    """Logits, memory over two steps, and gradients, at the float32 the numbers went through."""
    tensors, config = golden
    model = _released_model(config, backend)
    model.load_state_dict(lm2.release_state_dict(_group(tensors, "weights.")))
    memory = None
    for step in ("step0.", "step1."):
        want = _group(tensors, step)
        output = model(want["input_ids"], memory=memory)
        memory = output.memory.detach()
        loss = F.cross_entropy(output.logits.flatten(0, 1), want["targets"].flatten())
        for got, name in ((output.logits, "logits"), (memory.banks[0], "memory"), (loss, "loss")):
            error = (got - want[name]).abs().max() / want[name].abs().max()
            assert error < 2 * torch.finfo(torch.float32).eps, (name, error)
    loss.backward()
    gradients = lm2.release_state_dict(_group(tensors, "grads."))
    parameters = dict(model.named_parameters())
    assert set(gradients) == set(parameters)
    for name, want in gradients.items():
        # the gradient of the keys' bias is 0, as it moves all scores of a row alike
        floor = testing.ZERO_FLOOR * torch.finfo(torch.float64).eps
        error = (parameters[name].grad - want).abs().max()
        # sums over what the rounding of the logits moved, whose terms cancel
        bound = 8 * torch.finfo(torch.float32).eps * want.abs().max()
        assert error <= max(floor, bound), (name, error)


def test_release_state_dict(golden):
    tensors, _ = golden
    weights = _group(tensors, "weights.")
    attention = {k: v for k, v in weights.items() if ".self_attn." in k}
    doubled = {k.replace(".self_attn.", ".mem_attn.self_attn."): v for k, v in attention.items()}
    stored = {"model.memory_bank": torch.zeros(7, 32, 32)}
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    want = lm2.release_state_dict(weights)
    got = lm2.release_state_dict({**weights, **doubled, **stored})
    assert set(got) == set(want)
    alone = {k: v for k, v in weights.items() if k not in attention}
    assert set(lm2.release_state_dict({**alone, **doubled})) == set(want)
    name, tensor = next(iter(doubled.items()))
    with pytest.raises(ValueError, match="differs from the same weight"):
        lm2.release_state_dict({**weights, name: tensor + 1.0})
    with pytest.raises(ValueError, match="no checkpoint of the released model"):
        lm2.release_state_dict({"model.norm.weight": torch.ones(3)})


def test_checkpoint_of_other_keys_lists_them_all(golden):
    tensors, config = golden
    weights = lm2.release_state_dict(_group(tensors, "weights."))
    model = _released_model(config, None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["model.extra"] = weights.pop("model.norm.weight")
    weights["model.more"] = weights.pop("lm_head.weight")
    with pytest.raises(RuntimeError) as raised:
        model.load_state_dict(weights)
    for name in ("model.extra", "model.more", "model.norm.weight", "lm_head.weight"):
        assert name in str(raised.value)
    with pytest.raises(ValueError, match="hidden_size"):
        LM2Config(**{**SMALL, "hidden_size": 25})
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize(
    ("options", "billions"),
    (
        ({"memory_layers": ()}, 1.236),
        ({"formulation": "release"}, 1.236 + 0.537),
        ({"formulation": "paper"}, 1.236 + 0.403),
    ),
)
def test_published_sizes(options, billions):
    with torch.device("meta"):
        model = LM2ForCausalLM(LM2Config.published(**options))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=1e-3)


def test_new_models_write_something_of_the_token():
    model = LM2ForCausalLM(LM2Config(**SMALL))
    assert all(hasattr(layer, "candidate_proj") for layer in model.memory_layers())


@every_kind
def test_a_long_input_is_its_segments(formulation, flow):
    """One call over three segments, the last one short, is three calls with the state between."""
    model, ids = small_model(formulation=formulation, flow=flow), random_ids(2, 15)
    whole = model(ids)
    state, logits = None, []
    for piece in ids.split(SMALL["memory_slots"], dim=1):
        output = model(piece, memory=state)
        state = output.memory
        logits.append(output.logits)
    assert_round_off(torch.cat(logits, dim=1), whole.logits)
    for got, want in zip(state.banks, whole.memory.banks, strict=True):
        assert_round_off(got, want)
    assert len(state.banks) == (1 if flow == "depth" else SMALL["num_hidden_layers"])


@every_kind
def test_memory_reaches_later_segments(formulation, flow):
    model = small_model(formulation=formulation, flow=flow)
    changed = _changed(model, 12, 2)
    # token t of a segment sees the slots up to t, unless it sees all: the change was at slot 2
    first = 8 if model.config.memory_causal else 6
    assert not changed[6:first].any()
    assert (changed[first:] > 0).all()
    without = small_model(memory_layers=())
    changed = _changed(without, 12, 2)
    assert (changed[2:6] > 0).all()
    assert not changed[6:].any()
    assert without(random_ids(1, 12)).memory is None


@every_kind
def test_model_is_causal(formulation, flow):
    model = small_model(formulation=formulation, flow=flow)
    changed = _changed(model, 12, 9)
    assert not changed[:9].any()
    assert (changed[9:] > 0).all()


def test_released_gate_is_not_causal():
    model = small_model(formulation="release", pooled_gate="segment")
    assert _changed(model, 6, 5)[:5].max() > 0


@every_kind
@pytest.mark.parametrize("tied", (False, True))
def test_loss_is_the_mean_cross_entropy(formulation, flow, tied, monkeypatch):
    from lm2_kernels.model import decoder as module

    monkeypatch.setattr(module, "_LOSS_ROWS", 7)
    model = small_model(formulation=formulation, flow=flow, tie_word_embeddings=tied)
    ids = random_ids(2, 14)
    labels = ids.clone()
    labels[0, :9] = -100
    output = model(ids, labels, return_logits=True)
    want = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_round_off(output.loss, want)
    got = torch.autograd.grad(output.loss, list(model.parameters()), retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(want, list(model.parameters())), strict=True):
        assert_round_off(a, b)
    assert model(ids, labels).logits is None


@every_kind
def test_truncated_backpropagation(formulation, flow):
    """The last of four segments reaches back to the last cut."""
    model = small_model(formulation=formulation, flow=flow)
    ids = random_ids(1, 24)
    for segments, reached in ((1, 3), (2, 2), (3, 3), (4, 0), (None, 0)):
        embedded = []

        def keep(_, __, output, embedded=embedded):
            embedded.append(output)

        handle = model.model.embed_tokens.register_forward_hook(keep)
        logits = model(ids, bptt_segments=segments).logits
        handle.remove()
        gradients = torch.autograd.grad(logits[:, -1].sum(), embedded, allow_unused=True)
        is_reached = [gradient is not None and bool(gradient.any()) for gradient in gradients]
        assert is_reached == [index >= reached for index in range(4)], segments


@every_kind
def test_zero_init_changes_nothing(formulation, flow):
    """A fresh memory is an exact no-op, and yet it learns."""
    start = "zeros" if formulation == "release" else "identity"
    options = {"formulation": formulation, "flow": flow, "memory_init": start}
    model = small_model(torch.float32, zero_init=True, **options)
    plain = small_model(torch.float32, memory_layers=())
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".memory." not in k})
    ids = random_ids(2, 15)
    output = model(ids, ids, return_logits=True)
    assert torch.equal(output.logits, plain(ids).logits)
    output.loss.backward()
    for layer in model.memory_layers():
        assert any(p.grad is not None and p.grad.any() for p in layer.parameters())


@every_kind
def test_batch_rows_are_alone(formulation, flow):
    """No row sees another, nor what a reset row saw before, even where that is NaN."""
    model, ids = small_model(formulation=formulation, flow=flow), random_ids(3, 18)
    first, second = ids[:, :12], ids[:, 12:]
    state = model(first).memory
    for row in range(3):
        alone = model(first[row : row + 1])
        for bank, want in zip(state.banks, alone.memory.banks, strict=True):
            assert_round_off(bank[row : row + 1], want)
    spoilt = MemoryState([bank.index_fill(0, torch.tensor([1]), torch.nan) for bank in state.banks])
    fresh = spoilt.reset([1], model.initial_state(1))
    got, want = model(second, memory=fresh).logits, model(second, memory=state).logits
    assert_round_off(got[[0, 2]], want[[0, 2]])
    assert_round_off(got[1:2], model(second[1:2]).logits)


def test_learned_memory_learns():
    model = small_model(memory_init="learned", flow="time")
    assert model.initial_memory.shape == (3, 6, 24)
    ids = random_ids(2, 12)
    model(ids, ids).loss.backward()
    # the identity at first
    identity = lm2.initial_memory(1, 6, 24, dtype=torch.float64)[0]
    assert torch.equal(model.initial_memory[0].detach(), identity)
    assert model.initial_memory.grad.abs().amax((1, 2)).min() > 0


@needs_cpp
@every_kind
def test_backends_agree(formulation, flow):
    """The model is blind to its backend: what differs is rounding."""
    ids = random_ids(2, 15)
    results = []
    for backend in ("eager", "cpp"):
        model = small_model(torch.float64, formulation=formulation, flow=flow, backend=backend)
        with lm2.recording() as ran:
            output = model(ids, ids, return_logits=True)
            output.loss.backward()
        assert {name for _, name in ran} == {backend}
        results.append([output.logits, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert_round_off(a, b)


def test_loss_without_labels_is_zero():
    model, ids = small_model(), random_ids(2, 6)
    assert model(ids, torch.full_like(ids, -100)).loss == 0.0
    assert model(ids[:, :1], ids[:, :1]).loss == 0.0


def test_loss_holds_some_rows_of_logits_at_once(monkeypatch):
    from lm2_kernels.model import decoder as module

    monkeypatch.setattr(module, "_LOSS_ROWS", 8)
    model, ids = small_model(vocab_size=61), random_ids(2, 30)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        model(ids, ids)
    # the weight has a vocabulary's rows; nothing has its columns
    assert saved
    assert all(shape[-1] != 61 for shape in saved if len(shape) > 1)


def test_options_reach_the_layers():
    model = small_model(memory_dropout=0.5, backend="eager", initializer_range=0.5)
    assert {layer.dropout for layer in model.memory_layers()} == {0.5}
    assert {layer.backend for layer in model.memory_layers()} == {"eager"}
    ids = random_ids(1, 6)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
    for parameter in (model.lm_head.weight, model.memory_layers()[0].key_proj.weight):
        assert parameter.std().item() == pytest.approx(0.5, rel=0.1)


def test_tied_embeddings():
    model = small_model(tie_word_embeddings=True)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "lm_head.weight" not in weights
    ids = random_ids(1, 4)
    want = model(ids).logits
    other = small_model(seed=5, tie_word_embeddings=True)
    embedding = weights["model.embed_tokens.weight"]
    for head in ({}, {"lm_head.weight": embedding.clone()}):
        for assign in (False, True):
            other.load_state_dict({**weights, **head}, assign=assign)
            assert torch.equal(other(ids).logits, want)
    with pytest.raises(ValueError, match=r"differs from model\.embed_tokens"):
        other.load_state_dict({**weights, "lm_head.weight": embedding + 1.0})
    assert len(list(model.parameters())) + 1 == len(list(small_model().parameters()))


@every_kind
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_autocast_and_bfloat16_train(formulation, flow, dtype):
    """float32 weights under autocast, and weights of bfloat16: losses by the rule."""

    def run(seed):
        options = {"formulation": formulation, "flow": flow}
        model = small_model(dtype, seed, **options)
        exact, plain = small_model(**options), small_model(dtype, backend="eager", **options)
        for other in (exact, plain):
            other.load_state_dict(model.state_dict())
        found = []
        for each in (model, exact, plain):
            is_autocast = next(each.parameters()).dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
                outputs = [each(ids, ids) for ids in random_ids(16, 15, seed + 1).split(2)]
            found.append(torch.stack([output.loss for output in outputs]))
            if each is model:
                assert outputs[0].memory.banks[0].dtype == dtype
                assert outputs[0].loss.dtype == torch.float32
                found[0].sum().backward()
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                assert all(gradient.isfinite().all() for gradient in gradients)
        return [testing.compare("losses", *(losses.detach() for losses in found))]

    # of so few numbers, whose errors cancel, who is nearer is luck
    assert_rule(run, narrow=math.inf)


def test_memory_in_some_blocks():
    model = small_model(memory_layers=(1,), flow="time")
    assert [block.memory is not None for block in model.model.layers] == [False, True, False]
    assert len(model(random_ids(1, 3)).memory.banks) == 1


def test_state_rows():
    state = MemoryState([torch.randn(3, 4, 5), torch.randn(3, 4, 5)])
    for got, bank in zip(state.select([2, 0, 0, 1]).banks, state.banks, strict=True):
        assert torch.equal(got, bank[[2, 0, 0, 1]])
    for got, bank in zip(state.expand(2).banks, state.banks, strict=True):
        assert torch.equal(got, bank[[0, 0, 1, 1, 2, 2]])
    zeros = MemoryState([torch.zeros(1, 4, 5)] * 2)
    for rows in ([1], torch.tensor([False, True, False]), torch.tensor([1], dtype=torch.int32)):
        for got, bank in zip(state.reset(rows, zeros).banks, state.banks, strict=True):
            assert not got[1].any()
            assert torch.equal(got[[0, 2]], bank[[0, 2]])
    for got, bank in zip(state.reset([], zeros).banks, state.banks, strict=True):
        assert torch.equal(got, bank)
    assert state.to(torch.bfloat16).banks[0].dtype == torch.bfloat16
    tracked = MemoryState([torch.ones(1, 2, 2, requires_grad=True)])
    assert not tracked.detach().banks[0].requires_grad


def test_state_file(tmp_path):
    model = small_model(flow="time")
    state = model(random_ids(2, 6)).memory
    path = tmp_path / "state.safetensors"
    state.save(path)
    again = MemoryState.load(path)
    assert len(again.banks) == 3
    for a, b in zip(again.banks, state.banks, strict=True):
        assert torch.equal(a, b)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        MemoryState.load(path)
    save_file({"bank.0": torch.zeros(1, 2, 3)}, path)
    with pytest.raises(ValueError, match="holds no memory state"):
        MemoryState.load(path)


def test_a_state_file_says_how_tokens_are_bound(tmp_path):
    """Where it is not as in files that do not say it."""
    path = tmp_path / "state.safetensors"
    small_model(flow="time")(random_ids(2, 4), use_cache=True).memory.save(path)
    assert "tokens_per_slot" not in load_file(path)
    model, ids = small_model(flow="chunk"), random_ids(2, 6)
    state = model(ids[:, :4], use_cache=True).memory
    # in another dtype, of which the sums are not
    moved = state.to(torch.bfloat16)
    moved.save(path)
    assert torch.equal(MemoryState.load(path).banks[0], moved.banks[0])
    state.save(path)
    whole = load_file(path)
    kept = whole["cache.layers.0.memory.key0.constant"]
    got = model(ids[:, 4:], memory=MemoryState.load(path)).logits
    assert torch.equal(got, model(ids[:, 4:], memory=state).logits)
    for change in (
        {"tokens_per_slot": None},
        {"tokens_per_slot": torch.tensor(0)},
        {"tokens_per_slot": torch.tensor(2)},
        {"tokens_per_slot": torch.tensor([3])},
        {"tokens_per_slot": torch.tensor(3.0)},
        {"cache.bank1": None},
        {"cache.bank1.sum": None},
        {"cache.bank1": whole["cache.bank1"][:, :1].clone()},
        {"cache.layers.0.memory.key0.constant": whole["bank.0"][:, :1, None].clone()},
        # slots that the bank has not, sums of other rows
        {"cache.layers.0.memory.key0.constant": torch.cat([kept, kept], dim=1)},
        {"cache.bank0.sum": whole["cache.bank0.sum"][..., :-1].clone()},
        {"cache.bank0.sum": whole["cache.bank0.sum"].bfloat16()},
        {"cache.bank0.sum": whole["cache.bank0.sum"].repeat(1, 2, 1)},
    ):
        tensors = {k: v for k, v in {**whole, **change}.items() if v is not None}
        save_file(tensors, path, metadata={"format": "lm2_kernels.MemoryState"})
        with pytest.raises(ValueError, match="holds no memory state"):
            MemoryState.load(path)


def test_a_model_saved_before_there_were_candidates(tmp_path):
    model, ids = small_model(candidate="read"), random_ids(2, 14)
    model.save(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["candidate"]
    path.write_text(json.dumps(values))
    again = LM2ForCausalLM.load(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_pickled_model_from_before_there_were_rules():
    model, ids = small_model(flow="time"), random_ids(2, 14)
    config = LM2Config.from_dict(model.config.to_dict())
    want = model(ids).logits
    for name in ("segment_length", "memory_causal", "write", "candidate"):
        del model.config.__dict__[name]
    for layer in model.memory_layers():
        del layer.__dict__["tokens_per_slot"], layer.__dict__["candidate"]
    again = pickle.loads(pickle.dumps(model))
    assert again.config == config
    assert torch.equal(again(ids).logits, want)


@pytest.mark.parametrize("formulation", ("paper", "release"))
@pytest.mark.parametrize("length", range(1, 6))
def test_a_segment_of_chunks_is_ended_early(formulation, length):
    """Before a slot's last token, it holds the mean of those that came; later slots are as ever."""
    model, ids = small_model(formulation=formulation, flow="chunk"), random_ids(2, length)
    ended = model(ids, use_cache=True).memory.end_segment()
    for got, want, old in zip(
        ended.banks, model(ids).memory.banks, model.initial_state(2).banks, strict=True
    ):
        assert_round_off(got, want)
        touched = 1 if length <= 3 else 2
        assert torch.equal(got[:, touched:], old[:, touched:])
        assert (got[:, :touched] != old[:, :touched]).any(-1).all()


def test_rows_are_reset_to_the_end_of_another_segment():
    """In mid-chunk both the rows and what they are reset to."""
    model, ids = small_model(flow="chunk"), random_ids(3, 10)
    state = model(ids[:, :4], use_cache=True).memory
    other = model(ids[:1, 3:8], use_cache=True).memory
    got = state.reset([1], other)
    assert got.position.tolist() == [4, 0, 4]
    logits = model(ids[:, 8:], memory=got, use_cache=True).logits
    assert_round_off(logits[[0, 2]], model(ids[:, 8:], memory=state).logits[[0, 2]])
    alone = model(ids[1:2, 8:], memory=model(ids[:1, 3:8]).memory).logits
    assert_round_off(logits[1:2], alone)


def test_a_state_of_another_rule_is_refused():
    """Between two segments there is none."""
    model, ids = small_model(flow="chunk"), random_ids(2, 2)
    for options in (
        {"segment_length": 8},
        {"write": "position", "segment_length": 2, "memory_causal": False},
    ):
        other = small_model(**{"flow": "chunk", **options})
        state = other(ids[:, :1], use_cache=True).memory
        with pytest.raises(ValueError, match=r"binds \d tokens to a slot, the model 3"):
            model(ids, memory=state)
        with pytest.raises(ValueError, match="several configurations"):
            MemoryState.cat([state, model(ids, use_cache=True).memory])
        joined = MemoryState.cat([state.end_segment(), model(ids, use_cache=True).memory])
        assert joined.position.tolist() == [0, 0, 2, 2]
        model(random_ids(4, 2), memory=joined)
    causal = small_model(memory_slots=2, flow="time", candidate="token")
    with pytest.raises(ValueError, match="keeps other tensors than the model"):
        small_model(memory_slots=2, flow="time", memory_causal=False, candidate="token")(
            ids, memory=causal(ids[:, :1], use_cache=True).memory
        )


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda state: state.select([0]), "the input has 2 rows, the state 1"),
        (lambda state: MemoryState(state.banks[:1]), "3 memory banks, the state 1"),
        (lambda state: MemoryState([b[:, :5] for b in state.banks]), "another configuration"),
        (lambda state: MemoryState([b[..., :5] for b in state.banks]), "another configuration"),
    ),
)
def test_wrong_state_is_refused(change, message):
    model = small_model(flow="time")
    state = model.initial_state(2)
    with pytest.raises(ValueError, match=message):
        model(random_ids(2, 6), memory=change(state))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    (
        ({"input_ids": torch.full((1, 2), 61)}, ValueError, "below vocab_size = 61"),
        ({"input_ids": torch.full((1, 2), -1)}, ValueError, "got -1"),
        ({"input_ids": torch.zeros(1, 2)}, TypeError, "int64 tensor, got torch.float32"),
        ({"input_ids": [[1]]}, TypeError, "int64 tensor, got list"),
        ({"input_ids": torch.zeros(2, dtype=torch.int64)}, ValueError, r"\(B, L\)"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, "L >= 1"),
        ({"labels": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "labels the same"),
        ({"labels": torch.full((2, 6), 61)}, ValueError, "labels must be below"),
        ({"memory": torch.zeros(2, 6, 24)}, TypeError, "must be a MemoryState"),
        ({"bptt_segments": 0}, ValueError, "bptt_segments"),
    ),
)
def test_wrong_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        small_model()(**{"input_ids": random_ids(2, 6), **arguments})


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"num_attention_heads": 5}, r"num_attention_heads \(5\) must divide hidden_size"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads \(3\) must divide num_attention_heads"),
        ({"memory_heads": 5}, r"memory_heads \(5\) must divide"),
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, "must be even"),
        ({"memory_layers": (3,)}, "memory_layers has 3"),
        ({"memory_layers": (1, 0)}, "must ascend"),
        ({"formulation": "other"}, "formulation must be one of"),
        ({"flow": "up"}, "flow must be one of"),
        ({"memory_init": "ones"}, "memory_init must be one of"),
        ({"zero_init": True, "formulation": "release"}, "needs memory_init='zeros'"),
        ({"memory_init": "zeros"}, "zeros for ever"),
        ({"memory_slots": 0}, "memory_slots"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0"),
        ({"initializer_range": -1.0}, "initializer_range must be above 0"),
        ({"memory_dropout": 2.0}, "dropout"),
        ({"backend": "nope"}, "nope"),
        # without memory layers too
        ({"memory_layers": (), "write": "other"}, "write must be one of"),
        ({"memory_layers": (), "candidate": "other"}, "candidate must be one of"),
    ),
)
def test_wrong_config_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LM2Config(**{**SMALL, **options})


# of each kind of option, values of other kinds; JSON has no more kinds
_NO_NUMBER = (None, True, "1", [1], {"a": 1}, [[0]])
_NO_SIZE = (*_NO_NUMBER, 0, -1, 1.5, 2.0, math.nan, math.inf, 2**31, 10**30)
_NO_WORD = (None, True, 0, 1.5, "other", [], ["depth"], {})
_WRONG_KINDS = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "memory_slots"), _NO_SIZE),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "memory_heads"), _NO_SIZE),
    **dict.fromkeys(("num_key_value_heads", "segment_length"), _NO_SIZE[1:]),
    **dict.fromkeys(("tie_word_embeddings", "memory_recompute", "zero_init"), (None, 0, 1, "no")),
    **dict.fromkeys(
        ("rms_norm_eps", "rope_theta", "initializer_range"),
        (*_NO_NUMBER, 0, -1.0, math.nan, math.inf, -math.inf, 10**400),
    ),
    "memory_causal": (0, 1, "no"),
    "memory_dropout": (*_NO_NUMBER, -0.1, 1.0, 2, math.nan, math.inf),
    "memory_layers": (0, True, "01", 1.5, {"0": 1}, [[0]], ["0"], [True], [0.0], [None], [-1], [9]),
    **dict.fromkeys(
        ("formulation", "flow", "pooled_gate", "memory_init", "write", "candidate"), _NO_WORD
    ),
    "backend": (True, 0, 1.5, "other", [], {}),
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LM2Config)])
def test_an_option_of_another_kind_is_named(name):
    for value in _WRONG_KINDS[name]:
        with pytest.raises((TypeError, ValueError)) as raised:
            LM2Config.from_dict({**SMALL, name: value})
        text = str(raised.value)
        # an unknown backend's error lists those there are
        assert name in text or value == "other", (value, text)
        assert "must be" in text or "has 9" in text or value == "other", (value, text)


@pytest.mark.parametrize("values", (None, 3, [], "{}", [["vocab_size", 3]]))
def test_options_that_are_no_dict_are_refused(values):
    with pytest.raises(TypeError, match="the options must be a dict"):
        LM2Config.from_dict(values)
    with pytest.raises(ValueError, match=r"unknown options \[3, 'size'\]"):
        LM2Config.from_dict({**SMALL, 3: 4, "size": 5})


def test_a_configuration_is_fixed_and_takes_notes():
    """Its options cannot be changed, and hash and equality are theirs; Trainer writes others."""
    config, same = LM2Config(**SMALL), LM2Config(**SMALL)
    config.use_cache = config._attn_implementation = False
    assert (config, hash(config)) == (same, hash(same))
    for name in ("hidden_size", "memory_layers", "num_key_value_heads"):
        with pytest.raises(dataclasses.FrozenInstanceError, match=name):
            setattr(config, name, 4)
        with pytest.raises(dataclasses.FrozenInstanceError, match=name):
            delattr(config, name)
    assert LM2Config.from_dict(json.loads(config.to_json_string())) == config
    assert LM2Config.from_dict(config.to_dict()) == config
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config
    assert dataclasses.replace(config, memory_slots=7).memory_slots == 7


def test_data_parallel(monkeypatch):
    """Outputs without a memory are gathered; with one it is said that they cannot be."""
    gather = lambda device, dim, *tensors: torch.cat([t.reshape(-1, *t.shape[1:]) for t in tensors])  # noqa: E731
    monkeypatch.setattr(torch.nn.parallel.scatter_gather.Gather, "apply", gather)
    model, ids = small_model(memory_layers=()), random_ids(2, 9)
    model._is_replica = True
    gathered = torch.nn.parallel.gather([model(ids[:1]), model(ids[1:])], "cpu")
    assert isinstance(gathered, lm2.model.LM2Output)
    assert_round_off(gathered.logits, model(ids).logits)
    model = small_model()
    model._is_replica = True
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        model(ids)


def test_output_is_a_dict_and_a_tuple():
    model, ids = small_model(), random_ids(2, 9)
    output = model(ids, ids, return_logits=True)
    assert list(output) == ["loss", "logits", "memory"]
    assert output.loss is output["loss"] is output[0] is output.to_tuple()[0]
    assert output[1:] == (output.logits, output.memory)
    plain = model(ids)
    assert "loss" not in plain and plain.loss is None
    assert plain[0] is plain.logits
    with pytest.raises(KeyError):
        plain["loss"]
    with pytest.raises(AttributeError):
        plain.losses  # noqa: B018 - to be refused
    plain.loss, plain.logits = output.loss, None
    assert plain[0] is output.loss and "logits" not in plain
    plain.logits = output.logits
    assert list(plain) == ["loss", "logits", "memory"]
    with pytest.raises(AttributeError, match="no 'losses'"):
        plain.losses = output.loss
    # who walks through dicts makes them anew
    again = type(plain)({name: value for name, value in plain.items()})
    assert again.logits is plain.logits
    values, spec = pytree.tree_flatten(output)
    assert values[0] is output.loss
    assert pytree.tree_unflatten(values, spec).logits is output.logits
    mapped = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, plain)
    assert not mapped.logits.requires_grad


def test_outputs_are_pickled():
    ids = random_ids(2, 9)
    with torch.no_grad():
        output = small_model(memory_layers=())(ids, ids, return_logits=True)
    for again in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output)):
        assert type(again) is type(output)
        assert torch.equal(again.logits, output.logits)
        assert again.memory is None
    file = io.BytesIO()
    torch.save(output, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True).loss, output.loss)


def test_gradient_checkpointing_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="memory_recompute=True"):
        small_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={})


def test_state_refuses_what_is_no_bank():
    for banks, error in (
        ([], ValueError),
        ([torch.zeros(2, 3)], ValueError),
        ([torch.zeros(1, 2, 3), torch.zeros(1, 3, 3)], ValueError),
        ([torch.zeros(1, 2, 3, dtype=torch.int64)], TypeError),
        (["bank"], TypeError),
    ):
        with pytest.raises(error, match="MemoryState"):
            MemoryState(banks)
    state = MemoryState([torch.zeros(2, 3, 4)])
    for rows, error in (([2], ValueError), ([-1], ValueError), ([0.5], TypeError)):
        with pytest.raises(error, match="MemoryState"):
            state.select(rows)
    with pytest.raises(ValueError, match="times"):
        state.expand(0)


@every_kind
def test_every_module_is_called(formulation, flow):
    """So that whoever hooks, shards or offloads any of them is asked."""
    model, called = small_model(formulation=formulation, flow=flow), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(random_ids(1, 5))
    # the list of blocks has no forward
    assert called == {name for name, _ in model.named_modules()} - {"model.layers"}
