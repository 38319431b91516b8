"""``train --tasks``: what holds of files holds of tasks."""

import contextlib
import json
import re
import signal

import pytest
import torch
import torch.distributed as dist

from lm2_kernels import LM2ForCausalLM, cli, training
from lm2_kernels.cli import train as command
from lm2_kernels.evaluation import retrieval
from lm2_kernels.evaluation.layout import Layout
from lm2_kernels.evaluation.reading import Reader
from lm2_kernels.evaluation.tasks import task
from lm2_kernels.training.data import load_tokenizer
from tools.processes import run_processes

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "memory_slots": 4,
    "segment_length": 32,
    "memory_heads": 2,
    "memory_dropout": 0.2,
    "write": "chunk",
    "flow": "time",
}
OPTIONS = {
    "--tasks": ("mqar", "stories"),
    "--segments": ("2", "1"),
    "--curriculum": ("mixed",),
    "--loss": ("all",),
    "--layout": ("running",),
    "--steps": ("6",),
    "--batch": ("4",),
    "--seed": ("3",),
}
CHANGED = {
    "--tasks": ("mqar",),
    "--segments": ("1",),
    "--curriculum": ("ramp",),
    "--loss": ("answers",),
    "--layout": ("aligned",),
    "--lengths": ("0k",),
    "--tokenizer": ("bytes",),
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr("lm2_kernels.evaluation.lessons._ASKED", 4)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SIZES))
    return path


def _arguments(config, out, *more):
    options = [part for name, values in OPTIONS.items() for part in (name, *values)]
    return ["train", "--config", str(config), "--out", str(out), *options, *more]


def _recorded(patch):
    """The batches that training takes from now on."""
    seen, real = [], training.train

    def watched(model, batches, **options):
        def noted():
            for batch in batches:
                seen.append(batch)
                yield batch

        return real(model, noted(), **options)

    patch.setattr(training, "train", watched)
    return seen


def _cut(arguments, monkeypatch, step):
    real = training.train

    def watched(*args, progress, **options):
        def after(done, total, loss):
            if done == step:
                signal.raise_signal(signal.SIGINT)
            return progress(done, total, loss)

        return real(*args, progress=after, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", watched)
        assert cli.main(arguments) == 130


def _refused(arguments, capsys):
    capsys.readouterr()
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def test_tasks_train_a_model_that_answers(config, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(_arguments(config, out)) == 0
    printed = capsys.readouterr().out
    assert "tasks mqar stories at 1, 2 segments" in printed
    lines = re.findall(r"validation of (.*): loss \d+\.\d+, right .* % \(\d of 4\)", printed)
    assert lines == [f"{t}, {n}" for t in ("mqar", "stories") for n in ("1 segment", "2 segments")]
    assert f"the model is in {out}" in printed.splitlines()[-1]
    model, tokenizer = LM2ForCausalLM.load(out), load_tokenizer(out)
    assert model.config.vocab_size == tokenizer.vocab_size == len(tokenizer.words)
    prompt = ["generate", str(out), "--prompt", "cedar lantern . cedar ?", "--tokens", "2"]
    assert cli.main(prompt) == 0
    assert len(capsys.readouterr().out.split()) == 7


@pytest.mark.parametrize("layout", ("aligned", "running"))
def test_evaluate_asks_what_was_validated(layout, config, tmp_path, monkeypatch, capsys):
    """The same samples, laid out as in training: as many right answers of yes and no."""
    monkeypatch.setattr("lm2_kernels.evaluation.lessons._ASKED", 20)
    out, asked, real = tmp_path / "out", [], Reader.answer
    monkeypatch.setattr(
        Reader,
        "answer",
        lambda self, prompts, *more: asked.extend(prompts) or real(self, prompts, *more),
    )
    options = ["--tasks", "qa6", "--steps", "30", "--lr", "0.01", "--loss", "answers"]
    arguments = _arguments(config, out, *options, "--layout", layout)
    assert cli.main(arguments) == 0
    (right,) = re.findall(r"qa6, 2 segments: .* \((\d+) of 20\)", capsys.readouterr().out)
    results = tmp_path / "results.json"
    ask = ["evaluate", str(out), "--tasks", "qa6", "--lengths", "64", "--samples", "20"]
    assert cli.main([*ask, "--json", str(results)]) == 0
    (cell,) = json.loads(results.read_text())["cells"]
    assert cell["leaderboard"]["right"] == int(right) > 0
    rows = Layout(load_tokenizer(out), 32, layout)
    # the first is looked at before all are asked
    assert asked[-20:] == [rows.prompt(task("qa6").sample(n, 64)) for n in range(20)]


def test_a_run_on_tasks_goes_on_bit_for_bit(config, tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.main(_arguments(config, whole)) == 0
    _cut(_arguments(config, cut), monkeypatch, 3)
    assert cli.main(["train", "--out", str(cut), "--resume"]) == 0
    got, want = (LM2ForCausalLM.load(folder).state_dict() for folder in (cut, whole))
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_what_a_run_on_tasks_remembers(config, tmp_path, monkeypatch, capsys):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("What is written here is no fact, and nobody asks for it. " * 9)
    _cut(_arguments(config, out), monkeypatch, 3)
    resumed = ["train", "--out", str(out), "--resume"]
    for name, values in CHANGED.items():
        line = _refused([*resumed, name, *values], capsys)
        assert f"{name} of this run is " in line and "takes the run's own" in line
    assert "or --tasks, not both" in _refused([*resumed, str(text)], capsys)
    # a place may be another, but what is there counts
    line = _refused([*resumed, "--background", str(text)], capsys)
    assert f"--background of this run is None, got {text}: --resume takes the run's own" in line
    with monkeypatch.context() as patch:
        # what another version makes of a name
        patch.setattr(retrieval, "_VALUES", ("anchor", "basket"))
        assert "have changed: mqar" in _refused(resumed, capsys)
    # said again as it was
    same = [part for name, values in OPTIONS.items() for part in (name, *values)]
    assert cli.main([*resumed, *same]) == 0


def test_a_background_may_move(config, tmp_path, monkeypatch, capsys):
    """It is read byte by byte, unless words are asked for."""
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("Here is a long sentence about nothing of any use to anybody at all. " * 3)
    more = ("--segments", "4", "--background")
    _cut(_arguments(config, tmp_path / "out", *more, str(first)), monkeypatch, 3)
    first.rename(second)
    resumed = ["train", "--out", str(tmp_path / "out"), "--resume"]
    assert "first.txt" in _refused(resumed, capsys)
    assert cli.main([*resumed, "--background", str(second)]) == 0
    assert load_tokenizer(tmp_path / "out").kind == "bytes"
    arguments = _arguments(config, tmp_path / "words", *more, str(second), "--tokenizer", "words")
    assert cli.main(arguments) == 0
    assert "anybody" in load_tokenizer(tmp_path / "words").words


@pytest.mark.parametrize(
    ("more", "message"),
    (
        (["--length", "20"], "--length is for files, not for --tasks"),
        (["--validation", "0.1"], "--validation is for files"),
        (["--vocab-size", "300"], "--vocab-size is for files"),
        (["--lengths", "1k"], "--lengths or --segments, not both"),
        (["--segments", "0"], "segments must be at least 1"),
        (["--tasks", "qa11"], "qa11 is not generated"),
        (["--tasks", "mqar", "mqar"], "named twice"),
        (["--babi", "nowhere", "--tasks", "qa1"], "has no file qa1"),
        (["--background", "nowhere"], "nowhere"),
        (["--segment-length", "8"], "none fits into 8 tokens"),
    ),
)
def test_what_cannot_be_is_said_first(more, message, config, tmp_path, capsys):
    out = tmp_path / "out"
    assert message in _refused(_arguments(config, out, *more), capsys)
    assert not out.exists()


def test_options_of_tasks_are_not_for_files(config, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("Nobody asks. " * 99)
    arguments = ["train", str(text), "--config", str(config), "--out", str(out)]
    for name, value in (("--lengths", "1k"), ("--loss", "all"), ("--background", str(text))):
        assert f"{name} is for tasks" in _refused([*arguments, name, value], capsys)
    assert "not both" in _refused([*arguments, "--tasks", "qa1"], capsys)
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--tasks", "qa1", "--lengths", "a4"])
    assert "'a4' is no length" in capsys.readouterr().err


def _of_this_rank(arguments):
    options = cli._parser().parse_args(arguments)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as held:
        seen = _recorded(patch)
        command._train(options, held, dist.get_rank(), 2, torch.device("cpu"))
    return [{name: tensor.tolist() for name, tensor in batch.items()} for batch in seen]


def test_two_processes_take_what_one_takes(config, tmp_path, monkeypatch, capsys):
    arguments = _arguments(config, tmp_path / "two", "--layout", "aligned")
    parts = run_processes(_of_this_rank, arguments, folder=tmp_path / "processes")
    with monkeypatch.context() as patch:
        whole = _recorded(patch)
        arguments[arguments.index(str(tmp_path / "two"))] = str(tmp_path / "one")
        assert cli.main(arguments) == 0
    assert len(whole) == 6
    for step, batch in enumerate(whole):
        weights = [parts[rank][step].pop("weight") for rank in range(2)]
        assert min(weights) > 0.0 and round(sum(weights), 3) == 2.0
        for rank in range(2):
            for name, tensor in batch.items():
                assert parts[rank][step][name] == tensor[rank::2].tolist()
    one, two = (json.loads((tmp_path / n / "run.json").read_text()) for n in ("one", "two"))
    assert one == two
