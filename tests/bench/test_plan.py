"""What a plan counts is what a run does."""

import contextlib
import dataclasses
import functools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lm2_kernels as lm2
from lm2_kernels import LM2ForCausalLM, backends, cli
from lm2_kernels.bench import measure
from lm2_kernels.bench.plan import CEILINGS, LOSS, MEMORY, MLPS, REST, SELF_ATTENTION, Ceiling, plan
from lm2_kernels.bench.works import Row
from lm2_kernels.model.config import LM2Config
from tools.models import FLOWS, KINDS, SMALL

# two segments and a token
BATCH, TOKENS = 2, 13


def _config(formulation="paper", flow="depth", **options) -> LM2Config:
    return LM2Config(**{**SMALL, "formulation": formulation, **FLOWS[flow], **options})


def _run(config, dtype=torch.float32):
    model, ids = LM2ForCausalLM(config), torch.zeros(BATCH, TOKENS, dtype=torch.int64)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return (model(ids, ids).loss,)

    return model, step


_STEPS = [(*kind, torch.float32) for kind in KINDS]
_STEPS += [("paper", "chunk", torch.bfloat16), ("release", "time", torch.bfloat16)]
_STEPS = [(*step, {}) for step in _STEPS]
_STEPS += [
    ("paper", "time", torch.float32, {"memory_recompute": True}),
    ("paper", "time", torch.float32, {"memory_init": "learned", "memory_dropout": 0.1}),
    ("release", "depth", torch.float32, {"pooled_gate": "segment", "tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("formulation", "flow", "dtype", "options"), _STEPS, ids=str)
def test_a_training_step(formulation, flow, dtype, options):
    """Parameters, kept bytes and products, exactly."""
    config = _config(formulation, flow, **options)
    found = plan(config, batch=BATCH, tokens=TOKENS, dtype=dtype)
    model, step = _run(config, dtype)
    assert found.total("parameters") == sum(p.numel() for p in model.parameters())
    kept = measure.saved_bytes(Row(step, list(model.parameters())))
    assert found.total("kept") == kept
    counts = []
    with FlopCounterMode(display=False) as counter:
        (loss,) = step()
    counts.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    counts.append(counter.get_total_flops())
    # PyTorch counts neither our attention nor its own on a CPU
    attention = _attention(config)
    assert found.total("forward") == counts[0] + 2 * attention
    again = 2 * _attention(config, of_memory_alone=True) if config.memory_recompute else 0.0
    assert found.total("backward") == counts[1] + 5 * attention + again


def _attention(config, *, of_memory_alone=False) -> float:
    """FLOPs of one product of all attentions, by pairs."""
    pairs, left = 0, TOKENS
    while left > 0:
        size = min(left, config.segment_length)
        own = size * (size + 1) // 2
        pairs += 0 if of_memory_alone else config.num_hidden_layers * own
        pairs += len(config.memory_layers) * (
            own if config.memory_causal else size * config.memory_slots
        )
        left -= size
    return 2.0 * BATCH * config.hidden_size * pairs


def test_parts():
    config = _config(intermediate_size=50, tie_word_embeddings=True)
    found = plan(config, batch=BATCH, tokens=TOKENS).parts
    assert list(found) == [REST, SELF_ATTENTION, MEMORY, MLPS, LOSS]
    products = 2.0 * BATCH * TOKENS * 3 * 24 * 50 * config.num_hidden_layers
    assert (found[MLPS].forward, found[MLPS].backward) == (products, 2 * products)
    # the head is the embedding
    assert found[LOSS].parameters == 0
    assert found[REST].parameters == 61 * 24 + 7 * 24
    without = plan(dataclasses.replace(config, memory_layers=()), batch=BATCH, tokens=TOKENS).parts
    assert dataclasses.astuple(without[MEMORY]) == (0, 0, 0, 0)
    for name in (SELF_ATTENTION, MLPS, LOSS):
        assert without[name] == found[name]


@pytest.mark.parametrize(("formulation", "flow"), KINDS)
def test_decoding(formulation, flow):
    config = _config(formulation, flow)
    found = plan(config, batch=BATCH, tokens=TOKENS)
    model = LM2ForCausalLM(config)
    ids = torch.zeros(BATCH, config.segment_length, dtype=torch.int64)
    with torch.no_grad():
        state = model(ids[:, 1:], use_cache=True).memory
        assert found.decoding["banks"] == sum(bank.nbytes for bank in state.banks)
        assert sum(found.decoding.values()) - found.decoding["weights"] == state.nbytes
        with FlopCounterMode(display=False) as counter:
            model(ids[:, :1], memory=state, use_cache=True)
    seen = config.segment_length if config.memory_causal else config.memory_slots
    pairs = config.num_hidden_layers * config.segment_length + len(config.memory_layers) * seen
    attention = 2.0 * BATCH * config.hidden_size * pairs
    assert found.decode_flops == counter.get_total_flops() + 2 * attention


def test_a_model_that_cannot_go_on_within_a_segment():
    found = plan(_config("release", pooled_gate="segment"), batch=1, tokens=6)
    assert found.decode_flops is None
    assert found.seconds(CEILINGS["h100"])["last token"] is None


def test_bounds():
    found = plan(_config(), batch=1, tokens=6)
    moved = sum(found.training.values())
    slow_products = Ceiling({"float32": 1e3}, 1e30, 1.0)
    flops = found.total("forward") + found.total("backward")
    assert found.seconds(slow_products)["training step"] == flops / 1e3
    slow_memory = Ceiling({"float32": 1e30}, 10.0, 1.0)
    assert found.seconds(slow_memory)["training step"] == 2 * moved / 10.0
    # not all of the embedding, and no bank
    read = sum(found.decoding.values()) - found.decoding["banks"] - 4 * 61 * 24
    assert found.seconds(slow_memory)["last token"] == read / 10.0


def test_what_does_not_fit(monkeypatch):
    for options in ({"batch": 0, "tokens": 6}, {"batch": 1, "tokens": 2**31}):
        with pytest.raises(ValueError, match="must be"):
            plan(_config(), **options)
    with pytest.raises(ValueError, match="dtype"):
        plan(_config(), batch=1, tokens=6, dtype=torch.float64)
    with pytest.raises(ValueError, match="too large"):
        plan(_config(memory_slots=2**30, segment_length=2**30), batch=2**30, tokens=2**30)
    names = backends.NAMES
    monkeypatch.setattr(LM2ForCausalLM, "logits", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        plan(_config(), batch=1, tokens=6)
    assert names == backends.NAMES


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: default_dtype(torch.float64),
    ],
    ids=["no_grad", "inference_mode", "device", "autocast", "dtype"],
)
def test_what_the_caller_has_set_changes_nothing(around):
    want = _plan_of_one_segment()
    with around():
        assert _plan_of_one_segment.__wrapped__() == want


@functools.cache
def _plan_of_one_segment():
    return plan(_config(), batch=BATCH, tokens=6)


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


def test_other_threads_compute_meanwhile():
    layer, x = lm2.PaperMemory(16, 2), torch.randn(1, 4, 16)
    with torch.no_grad():
        want = layer(x, x)[0]
    done = threading.Event()

    def compute():
        with torch.no_grad():
            while not done.is_set():
                assert torch.equal(layer(x, x)[0], want)

    with ThreadPoolExecutor(2) as pool:
        # and another plan
        running = pool.submit(compute), pool.submit(plan, _config(), batch=1, tokens=6)
        plan(_config(), batch=1, tokens=6)
        done.set()
        for future in running:
            future.result()


def test_nothing_is_allocated():
    """Of a model that no machine here has room for."""
    config = LM2Config(
        vocab_size=128000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=2,
        num_attention_heads=64,
        memory_layers=(1,),
        memory_slots=64,
        segment_length=2048,
        write="chunk",
        flow="time",
    )
    found = plan(config, batch=64, tokens=4096, dtype=torch.bfloat16)
    assert found.total("kept") > 1e11


def test_command(tmp_path, capsys):
    config, report = tmp_path / "model.json", tmp_path / "plan.json"
    config.write_text(json.dumps(_config().to_dict()))
    arguments = ["plan", "--config", str(config), "--batch", "2", "--json", str(report)]
    assert cli.main([*arguments, "--device", "h100"]) == 0
    shown = capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["plan"]["tokens"] == 4 * 6
    total = sum(part["parameters"] for part in found["plan"]["parts"].values())
    assert f"{total:,}" in shown
    assert list(found["bounds"]) == ["h100"]
    assert "perhaps" in shown
    LM2ForCausalLM(_config()).save(tmp_path / "saved")
    assert cli.main(["plan", "--config", str(tmp_path / "saved")]) == 0
    assert f"{total:,}" in capsys.readouterr().out
    config.write_text("{}")
    assert cli.main(arguments) == 2
    assert "vocab_size" in capsys.readouterr().err


def test_of_this_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "ceilings", lambda *_: {"copy": 1e9, "float32": 1e9})
    config = tmp_path / "model.json"
    config.write_text(json.dumps(_config().to_dict()))
    assert cli.main(["plan", "--config", str(config), "--device", "here"]) == 0
    assert "here" in capsys.readouterr().out
