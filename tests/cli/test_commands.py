"""``train`` and ``generate``: own data, one process and two, runs that go on."""

import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lm2_kernels import LM2ForCausalLM, cli, training
from lm2_kernels.cli import train
from tools.processes import run_processes

TEXT = "the memory reads what it wrote, and writes what it read. " * 40
_LR = 0.01
_CHUNK = ["--write", "chunk", "--flow", "time"]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "memory_slots": 8,
    "memory_heads": 2,
}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    return path


def _arguments(text, out, *more):
    config = text.with_name("config.json")
    options = ["--steps", "6", "--batch", "4", "--lr", str(_LR), "--length", "20", *more]
    data = [str(text), *(option for option in more if option.endswith(".npy"))]
    options = [option for option in options if option not in data]
    return ["train", *data, "--config", str(config), "--out", str(out), *options]


def _run_by_torchrun(arguments):
    """In two processes, as a user starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # else it asks for this host's name, which a container need not know, and waits for minutes
    command.append("--local-addr=localhost")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [*command, "-m", "lm2_kernels", *arguments],
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
        env=environment,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def _train(arguments):
    """What a process of :func:`run_processes` does of a command."""
    options = cli._parser().parse_args(arguments)
    with contextlib.ExitStack() as held:
        train._train(options, held, dist.get_rank(), 2, torch.device("cpu"))


def _weights(folder):
    return LM2ForCausalLM.load(folder).state_dict()


def _same(got, want):
    got, want = _weights(got), _weights(want)
    assert got.keys() == want.keys()
    total = sum((got[name] - want[name]).abs().sum().item() for name in want)
    # Sums of gradients come in another order, and AdamW makes a whole step, up or down, also of a
    # gradient that is rounding alone: few of many thousand weights may have gone the other way.
    assert total <= 10 * _LR, total


def test_text_trains_and_generates(text, tmp_path, capsys):
    out = tmp_path / "model"
    assert cli.main(_arguments(text, out, "--steps", "60")) == 0
    printed = capsys.readouterr()
    assert "bits a token" in printed.out
    assert "60/60" in printed.err
    loss = float(printed.out.split("validation loss ")[1].split()[0])
    assert loss < 4.0 < np.log(256)
    for more in (["--temperature", "0"], ["--top-k", "5", "--top-p", "0.9"]):
        prompt = ["generate", str(out), "--prompt", "the mémo", "--tokens", "12", *more]
        assert cli.main(prompt) == 0
        assert capsys.readouterr().out.startswith("the mémo")
    model = LM2ForCausalLM.load(out)
    assert model.config.vocab_size == 256


def test_token_arrays_train_and_generate(tmp_path, capsys):
    for number, dtype in enumerate((np.uint16, np.int64)):
        np.save(tmp_path / f"{number}.npy", np.tile(np.arange(11, dtype=dtype), 30))
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    more = [str(tmp_path / "1.npy"), "--dtype", "bfloat16"]
    arguments = _arguments(tmp_path / "0.npy", tmp_path / "model", *more)
    options = ["--formulation", "release", "--flow", "time", "--slots", "5"]
    assert cli.main([*arguments, *options]) == 0
    config = LM2ForCausalLM.load(tmp_path / "model").config
    assert (config.vocab_size, config.formulation, config.memory_slots) == (11, "release", 5)
    capsys.readouterr()
    assert (
        cli.main(["generate", str(tmp_path / "model"), "--prompt", "1, 2 3", "--tokens", "4"]) == 0
    )
    assert len(capsys.readouterr().out.split()) == 7
    for prompt in ("11", "-1", str(10**30)):
        assert cli.main(["generate", str(tmp_path / "model"), f"--prompt={prompt}"]) == 2
        assert "the model knows the token ids 0 to 10" in capsys.readouterr().err
    assert cli.main([*arguments, "--no-memory", "--overwrite"]) == 0
    assert LM2ForCausalLM.load(tmp_path / "model").config.memory_layers == ()


@pytest.mark.parametrize("kind", ("ddp", "fsdp"))
def test_two_processes_are_one(text, tmp_path, kind):
    """Two processes with half of each batch give the weights of one process."""
    assert cli.main(_arguments(text, tmp_path / "one")) == 0
    arguments = _arguments(text, tmp_path / "two", "--parallel", kind, "--telemetry", "3")
    if kind == "fsdp":
        _run_by_torchrun(arguments)
    else:
        # processes that begin anew take ten times as long
        run_processes(_train, arguments, folder=tmp_path / "processes")
    _same(tmp_path / "two", tmp_path / "one")
    # of the first process alone
    lines = (tmp_path / "two" / "telemetry.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6]


def test_a_run_goes_on_with_another_number_of_processes(text, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.main(_arguments(text, whole)) == 0
    real = training.train

    def stopped(*args, progress, **options):
        def stop(done, total, loss):
            progress(done, total, loss)
            if done == 4:
                raise KeyboardInterrupt

        return real(*args, progress=stop, **options)

    monkeypatch.setattr(training, "train", stopped)
    assert cli.main(_arguments(text, cut, "--save-every", "2")) == 130
    monkeypatch.undo()
    resumed = ["train", "--out", str(cut), "--resume", "--parallel", "fsdp"]
    run_processes(_train, resumed, folder=tmp_path / "processes")
    _same(cut, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (["--config", "absent.json"], "No such file"),
        (["--batch", "0"], "batch"),
        (["--length", "3000"], "windows of 3000 tokens"),
        (["--vocab-size", "9"], "text has 256 tokens"),
        (["--steps", "0"], "steps"),
        (["--length", "1"], "--length must be at least 2"),
        (["--save-every", "0"], "--save-every must be"),
        (["--weight-decay", "-1"], "--weight-decay must be"),
        (["--validation", "nan"], "validation share"),
        (["--seed", "-1"], "--seed must be"),
        (["--seed", str(2**63)], "--seed must be"),
        (["--lr", "1e30"], "the loss of step"),
        (["more.npy"], "not both"),
        (["--flow", "time", "--bptt-segments", "0"], "--bptt-segments must be at least 1"),
        (["--lr", "nan"], "--lr must be"),
        (["--lr", "-1"], "--lr must be"),
        (["--clip", "0"], "--clip must be"),
        (["--warmup", "-1"], "--warmup must be"),
        (["--batch", "-4"], "--batch must be"),
        (["--vocab-size", "0"], "--vocab-size must be"),
        (["--slots", "0"], "--slots must be"),
        (["--slots", "5000000000"], "--slots must be"),
        (["--segment-length", "0"], "--segment-length must be"),
        (
            ["--segment-length", "16"],
            "--segment-length (16) must be at most --slots (8); --write chunk binds several",
        ),
        (["--segment-length", "16", "--write", "chunk"], "--write chunk needs --flow time"),
        (["--no-memory-causal"], "--no-memory-causal needs --flow time"),
        ([*_CHUNK, "--segment-length", "12"], "--segment-length / --slots tokens to each slot"),
        ([*_CHUNK, "--segment-length", "4"], "(4) must be a multiple of --slots (8)"),
        ([*_CHUNK, "--memory-causal"], "of a model: --no-memory-causal), got True"),
    ),
)
def test_wrong_training_options_are_one_line(text, tmp_path, capsys, options, message):
    assert cli.main(_arguments(text, tmp_path / "out", *options)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("python -m lm2_kernels train: error:")
    assert message in error
    # whatever was wrong was seen before anything was written, or nothing of value was
    assert not (tmp_path / "out").exists()


def test_wrong_runs_are_refused(text, tmp_path, capsys):
    out = tmp_path / "out"
    resumed = ["train", str(text), "--out", str(out), "--resume"]
    config = text.with_name("config.json")
    for content, arguments, message in (
        (SIZES, resumed, "holds no run"),
        (SIZES, [*resumed, "--slots", "9"], "--slots does not fit"),
        (SIZES, [*resumed, "--overwrite"], "give one of them"),
        ([1], _arguments(text, out), "must hold an object"),
        ({**SIZES, "memory_layers": 0}, _arguments(text, out), "memory_layers must be a list"),
        ({**SIZES, "vocab_size": 300}, _arguments(text, out), "text has 256 tokens"),
        ({**SIZES, "vocab_size": 200}, _arguments(text, out), "the data has 256 tokens"),
    ):
        config.write_text(json.dumps(content))
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
    config.write_text(json.dumps(SIZES))
    assert cli.main(_arguments(text, out)) == 0
    assert cli.main(resumed) == 2
    assert "holds no saved run" in capsys.readouterr().err
    for options, message in (
        (["--temperature", "-1"], "--temperature must be"),
        (["--temperature", "nan"], "--temperature must be"),
        (["--temperature", "0", "--top-k", "3"], "above 0"),
        (["--tokens", "0"], "max_new_tokens"),
    ):
        capsys.readouterr()
        assert cli.main(["generate", str(out), "--prompt", "the", *options]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert message in printed.err
