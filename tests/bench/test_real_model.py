"""The cells of a pretrained model with a memory, on a tiny one."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import tokenizers
import transformers

from lm2_kernels.evaluation import all_words
from tools.rounding import assert_round_off

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "real_model.py"


@pytest.fixture
def study(monkeypatch):
    """The script, with little to do."""
    spec = importlib.util.spec_from_file_location("real_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "real_model", module)
    spec.loader.exec_module(module)
    stages = (module.Stage(1, ("place",), (0,)), module.Stage(2, ("qa1", "niah"), (1, 2)))
    monkeypatch.setattr(module, "CURRICULUM", stages)
    monkeypatch.setattr(module, "LENGTHS", {"place": (32,), "niah": (32,), "qa1": (0, 64)})
    for name, value in (("BATCH", 2), ("TESTED", 3), ("WARMUP", 1)):
        monkeypatch.setattr(module, name, value)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of transformers, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    words = sorted({form for word in all_words() for form in (word, word.capitalize())})
    numbers = {word: number for number, word in enumerate(["[PAD]", *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="[PAD]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(numbers), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(study, monkeypatch, folder, out, minutes, dtype="float32", more=()):
    arguments = ("--model", folder, "--seeds", 1, "--minutes", minutes, "--out", out, *more)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments), "--dtype", dtype])
    study.main()
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def test_a_cell_that_was_cut_ends_as_one_that_was_not(study, monkeypatch, folder, tmp_path):
    seed, plain = run(study, monkeypatch, folder, tmp_path / "whole.jsonl", 10)
    assert (plain["cell"], seed["cell"]) == ("plain", 1)
    assert seed["unchanged before"] is True
    assert seed["dtype"] == plain["dtype"] == "float32"
    assert list(plain["answers"]) == list(seed["answers"]) == [
        "place 32", "niah 32", "qa1 0", "qa1 64",
    ]  # fmt: skip
    for result, how in ((plain, "one window"), (seed, "memory"), (seed, "another's")):
        counts = [count[how] for count in result["answers"].values()]
        assert all(0 <= right <= total == 3 for right, total in counts)
    # each call does one step, or asks one cell, and is then cut
    out, calls = tmp_path / "cut.jsonl", 0
    while len(lines := run(study, monkeypatch, folder, out, 0)) < 2:
        calls += 1
    assert calls >= 4
    for result, whole in zip(
        sorted(lines, key=lambda r: r["cell"] == 1), (plain, seed), strict=True
    ):
        assert result["answers"] == whole["answers"]
        assert result.get("losses") == whole.get("losses")
    # and what was trained is the same, to the last bit
    files = [tmp_path / name / "1.safetensors" for name in ("whole", "cut")]
    tensors = [study.Kept(file, seed["kind"]).tensors for file in files]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def test_a_cell_goes_on_as_what_it_was(study, monkeypatch, folder, tmp_path):
    """In the same dtype, and on the same study; neither a checkpoint nor a line joins others."""
    out = tmp_path / "out.jsonl"
    assert run(study, monkeypatch, folder, out, 0) == []
    with pytest.raises(ValueError, match=r"1\.safetensors is of another dtype: take another --out"):
        run(study, monkeypatch, folder, out, 0, "bfloat16")
    monkeypatch.setattr(study, "asking", lambda sample: f"{sample.question} It is")
    with pytest.raises(ValueError, match=r"1\.safetensors is of another study"):
        run(study, monkeypatch, folder, out, 0)
    other = tmp_path / "other.jsonl"
    other.write_text('{"cell": 2}\n')
    with pytest.raises(ValueError, match=r"other\.jsonl is of another model and dtype and study"):
        run(study, monkeypatch, folder, other, 0)


def test_the_first_steps_are_those_of_the_whole(study, monkeypatch, folder, tmp_path):
    seed, _ = run(study, monkeypatch, folder, tmp_path / "whole.jsonl", 10)
    (first,) = run(study, monkeypatch, folder, tmp_path / "first.jsonl", 10, more=("--first", 2))
    assert first["steps"] == 2 and first["answers"] == {}
    assert sum(map(len, first["losses"].values())) == 2
    for kind, losses in first["losses"].items():
        assert losses == seed["losses"][kind]
    # nor are they taken for the whole, or the whole for them
    for name, more in (("first", ()), ("whole", ("--first", 2)), ("new", ("--first", 4))):
        with pytest.raises(SystemExit):
            run(study, monkeypatch, folder, tmp_path / f"{name}.jsonl", 10, more=more)
    out = tmp_path / "read.jsonl"
    (read,) = run(study, monkeypatch, folder, out, 10, more=("--first", 2, "--candidate", "read"))
    assert read["parameters"] < first["parameters"]
    out.write_text("")
    # what was kept of it is not gone on with
    with pytest.raises(ValueError, match="of another study: take another --out"):
        run(study, monkeypatch, folder, out, 10, more=("--first", 2))


def test_answers_that_begin_alike_are_refused_first(study, monkeypatch, folder, tmp_path):
    monkeypatch.setattr(study.Reader, "first_tokens", lambda self, answers: torch.ones(9).long())
    monkeypatch.setattr(study, "train", None)
    with pytest.raises(ValueError, match="place: two answers begin with one token"):
        run(study, monkeypatch, folder, tmp_path / "out.jsonl", 10)


def test_a_context_of_fewer_windows_is_read_as_alone(study, folder):
    """Rows are padded by whole windows, which leave the memory as it was."""
    reader = study.load(folder, None)
    memory = study.give_memory(reader.model, 0, "token").memory
    for layer in memory.layers:
        torch.nn.init.normal_(layer.value_proj.weight)
    reader.double()
    rows = [list(range(1, 71)), list(range(5, 5 + study.WINDOW))]
    with torch.no_grad():
        reader.read(*study.padded(rows, multiple=study.WINDOW))
        together = memory.state.select([1]).banks
        reader.read(*study.padded(rows[1:], multiple=study.WINDOW))
    for both, alone in zip(together, memory.state.banks, strict=True):
        assert_round_off(both, alone)


def test_one_place_tells_the_one_fact(study):
    for number in range(20):
        sample = study.task_named("place", 0, validation=True).sample(number)
        person = sample.question.split()[-1].rstrip("?")
        assert sample.context.startswith(f"{person} ") and sample.context.count(".") == 1
        assert sample.context.endswith(f"the {sample.answer}.")
