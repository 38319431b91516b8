"""``evaluate``: model folders and patched hosts in one line, going on, one line for each error."""

import importlib.util
import json
import os
import signal
import sys

import pytest
import torch

from lm2_kernels import LM2ForCausalLM, cli
from lm2_kernels.cli import evaluate
from lm2_kernels.cli.arguments import length
from lm2_kernels.evaluation.reading import Reader
from lm2_kernels.evaluation.results import Results
from lm2_kernels.evaluation.samples import plain
from lm2_kernels.evaluation.tasks import all_words
from lm2_kernels.training.data import Bytes, Ids, Words, save_tokenizer
from tools.hosts import bare_llama, hosted, llama
from tools.models import small_model

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
_FEW = ["--samples", "6", "--tokens", "4", "--device", "cpu"]


def _save(folder, tokenizer, vocab_size):
    small_model(torch.float32, vocab_size=vocab_size, initializer_range=0.2).save(folder)
    save_tokenizer(folder, tokenizer)
    return str(folder)


@pytest.fixture
def texts(tmp_path):
    """A model as ``train`` writes it of texts."""
    return _save(tmp_path / "texts", Bytes(), 256)


@pytest.fixture
def words(tmp_path):
    """A model of words."""
    known = Words(all_words())
    return _save(tmp_path / "words", known, known.vocab_size)


def _run(*arguments):
    return cli.main(["evaluate", *map(str, arguments)])


def test_a_model_folder(texts, capsys):
    assert _run(texts, "--tasks", "qa1", "--lengths", "0k", *_FEW) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines if line] == [
        "leaderboard:", "0k", "qa1", "harness:", "0k", "qa1",
    ]  # fmt: skip
    assert "6/6" in printed.err


def test_words_at_several_lengths(words, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path, plots = tmp_path / "a.json", tmp_path / "plots"
    arguments = [words, "--tasks", "qa1", "mqar", "niah", "--lengths", "0k", "80", *_FEW]
    assert _run(*arguments, "--json", path, "--answers", "--plots", plots, "--seed", 5) == 0
    assert "answers.png" in capsys.readouterr().out
    assert "<svg" in (plots / "answers.svg").read_text("utf-8")
    results = Results.read(path)
    found = [(cell.task, cell.length, cell.asked) for cell in results.cells]
    assert found == [(task, n, 6) for task in ("qa1", "mqar", "niah") for n in (0, 80)]
    assert results.options["seed"] == 5
    assert results.options["prompt"] == "plain"
    assert results.runs[0]["command"][:2] == ["evaluate", words]
    # one word, as the answer has
    assert all(len(answer["answer"].split()) == 1 for answer in results.cells[0].answers)
    # it is the model's own likeliest
    first = results.cells[0].answers[0]
    sample = evaluate.task("qa1", seed=5).sample(0)
    assert first["wanted"] == sample.answer
    model, known = LM2ForCausalLM.load(words, device="cpu").eval(), Words(all_words())
    likeliest = model(torch.tensor([known.encode(plain(sample)[0])])).logits[0, -1].argmax()
    assert first["answer"] == known.decode([likeliest.item()])


@hosted
def test_a_patched_llama(tmp_path, capsys):
    """A folder of transformers and one with the memory; the prompt is ten windows long."""
    import tokenizers
    import transformers

    # letters, as a vocabulary of 50 has room for
    signs = [*"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQ", *"?:<>/.", " "]
    letters = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({sign: n for n, sign in enumerate(signs)}, unk_token=" ")
    )
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    bare_llama().save_pretrained(tmp_path / "llama")
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(
        tmp_path / "llama"
    )
    llama().save_pretrained(tmp_path / "memory")
    capsys.readouterr()
    arguments = [tmp_path / "llama", "--tasks", "qa1", "--lengths", "0k", *_FEW, "--samples", 2]
    path = tmp_path / "a.json"
    assert _run(*arguments, "--memory", tmp_path / "memory", "--window", 64, "--json", path) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("  qa1")
    assert Results.read(path).options["window"] == 64
    # the same without the memory is another model
    assert _run(*arguments, "--window", 64, "--json", path) == 2
    assert "of a model with other weights" in capsys.readouterr().err
    assert _run(*arguments) == 2
    assert "read it by smaller windows (--window)" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_interrupted_goes_on(words, tmp_path, capsys, monkeypatch, number):
    whole, path = tmp_path / "whole.json", tmp_path / "cut.json"
    arguments = [words, "--tasks", "qa1", "niah", *_FEW, "--answers", "--batch", 2]
    assert _run(*arguments, "--json", whole) == 0
    real, answered = Reader.answer, []

    def answer(*args):
        answered.append(args)
        if len(answered) == 4:
            # while the first batch of the second task is read
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(Reader, "answer", answer)
    assert _run(*arguments, "--json", path) == 128 + number
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert error.endswith(f"the answers are in {path}: the same command goes on from there")
    # the batch that was under way is not lost
    assert [cell.asked for cell in Results.read(path).cells] == [6, 2]
    assert _run(*arguments, "--json", path) == 0
    assert len(answered) == 6
    got, want = Results.read(path), Results.read(whole)
    for cell, other in zip(got.cells, want.cells, strict=True):
        cell.minutes = other.minutes
        assert cell == other
    del answered[3:]
    arguments.remove("--answers")
    assert _run(*arguments) == 128 + number
    assert "nothing was saved (--json)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, text",
    [
        (["--tasks", "qa21"], "there is no task 'qa21'"),
        (["--tasks", "qa11"], "give the folder of bAbI's files"),
        (["--tasks", "mqar", "--lengths", "4"], "fits into 4 tokens"),
        (["--samples", "0"], "samples must be at least 1"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--tokens", "0"], "tokens must be at least 1"),
        (["--prompt", "babilong"], "it takes the prompts plain and aligned"),
        (["--window", "8"], "reads in segments of 6"),
        (["--memory", "elsewhere"], "has its own memory"),
        (["--babi", "nowhere"], "nowhere"),
        (["--background", "nowhere"], "nowhere"),
        (["--answers"], "give --json"),
        (["--json", "no/where.json"], "there is no folder no"),
        pytest.param(["--plots", "config.json"], "is no folder", marks=needs_matplotlib),
    ],
)
def test_user_errors(words, tmp_path, monkeypatch, capsys, more, text):
    monkeypatch.chdir(words)
    assert _run(words, *_FEW, *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m lm2_kernels evaluate: error: ")
    assert text in line


def test_user_errors_of_the_parser(capsys):
    for wrong in ("k", "-1", "1.5k", "1kk"):
        with pytest.raises(SystemExit) as error:
            _run("model", f"--lengths={wrong}")
        assert error.value.code == 2
        assert "is no length such as 0k, 4k or 1500" in capsys.readouterr().err
    assert [length(text) for text in ("0k", "1k", "128K", "1m", "1500")] == [
        0, 1000, 128_000, 1_000_000, 1500,
    ]  # fmt: skip


def test_models_that_cannot_be_asked(words, tmp_path, capsys, monkeypatch):
    few = _save(tmp_path / "few", Words(["mary"]), 1)
    assert _run(few, "--tasks", "qa1", *_FEW) == 2
    assert "qa1 at 0k, sample 0: the model knows 1 words, and not " in capsys.readouterr().err
    ids = _save(tmp_path / "ids", Ids(), 9)
    assert _run(ids, *_FEW) == 2
    assert "text cannot be asked of it: in Python, give the tokenizer" in capsys.readouterr().err
    assert _run(tmp_path / "nothing", *_FEW) == 2
    assert "no such file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "config.json").write_text("{}")
    assert _run(tmp_path / "host", *_FEW) == 2
    assert 'pip install "lm2_kernels[transformers]"' in capsys.readouterr().err


def test_results_of_others_are_left_alone(words, tmp_path, capsys):
    path = tmp_path / "a.json"
    arguments = [words, "--tasks", "qa1", *_FEW, "--json", path]
    path.write_text('{"cells": []}')
    assert _run(*arguments) == 2
    assert "holds JSON of something else" in capsys.readouterr().err
    assert path.read_text() == '{"cells": []}'
    path.write_text("")
    assert _run(*arguments) == 0
    background = tmp_path / "background.txt"
    background.write_text("It was a day like any other in the town by the sea. " * 9)
    before = path.read_text()
    for more, text in (
        (["--seed", 1], "seed 0, not 1"),
        (["--samples", 7], "samples 6, not 7"),
        (["--tokens", 3], "tokens 4, not 3"),
        (["--background", background], f"background None, not {background}"),
    ):
        assert _run(*arguments, *more) == 2
        assert f"error: the results are of {text}" in capsys.readouterr().err
        assert path.read_text() == before
    # tasks and lengths join, and batches are free
    assert _run(words, "--tasks", "mqar", *_FEW, "--json", path, "--batch", 3) == 0
    assert [cell["task"] for cell in json.loads(path.read_text())["cells"]] == ["qa1", "mqar"]
