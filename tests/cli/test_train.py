"""``train``'s folder: what it never touches, runs that go on, data, full disks, signals, kills."""

import contextlib
import errno
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import filesystem

from lm2_kernels import LM2ForCausalLM, cli, disk, training
from lm2_kernels.cli import train as command
from lm2_kernels.training import folder, sources
from tools.rounding import assert_round_off

TEXT = "the memory reads what it wrote, and writes what it read. " * 20
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "memory_slots": 8,
    "memory_heads": 2,
    "memory_dropout": 0.2,
}
# none is the default
OPTIONS = {
    "--steps": "6",
    "--batch": "4",
    "--length": "20",
    "--bptt-segments": "2",
    "--lr": "0.01",
    "--warmup": "3",
    "--weight-decay": "0.2",
    "--clip": "0.5",
    "--dtype": "bfloat16",
    "--validation": "0.1",
    "--seed": "7",
}


# of the model: three slots over segments of nine tokens, where the configuration has eight slots
FEW_SLOTS = (
    "--slots", "3", "--segment-length", "9", "--write", "chunk", "--flow", "time",
    "--candidate", "token",
)  # fmt: skip


@pytest.fixture(autouse=True)
def short_validation(monkeypatch):
    monkeypatch.setattr(sources, "_VALIDATION", 2)


def _written(folder):
    (folder / "config.json").write_text(json.dumps(SIZES))
    path = folder / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def text(tmp_path):
    return _written(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run beside its text, made once."""
    place = tmp_path_factory.mktemp("finished")
    assert cli.main(_arguments(_written(place), place / "out", "--save-every", "2")) == 0
    return place


@pytest.fixture
def model(tmp_path, text, finished):
    """What a finished run on the text leaves, at ``tmp_path / "out"``."""
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    run = (out / "run.json").read_text()
    assert str(finished) in run
    (out / "run.json").write_text(run.replace(str(finished), str(tmp_path)))
    return out


def _arguments(text, out, *more):
    options = [part for option in OPTIONS.items() for part in option]
    config = str(text.with_name("config.json"))
    return ["train", str(text), "--config", config, "--out", str(out), *options, *more]


def _tree(path: Path) -> dict:
    return {str(p.relative_to(path)): p.is_file() and p.read_bytes() for p in path.rglob("*")}


def _refused(arguments, capsys) -> str:
    """The one line of a command that cannot be done."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("python -m lm2_kernels train: error: ")
    return line


def _weights(path) -> dict:
    return LM2ForCausalLM.load(path).state_dict()


def _equal(got, want):
    got, want = _weights(got), _weights(want)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def _during(monkeypatch, step, act):
    """Have ``act`` called after a step of training, before the command hears of it."""
    real = training.train

    def watched(*args, progress, **options):
        def after(done, total, loss):
            if done == step:
                act()
            return progress(done, total, loss)

        return real(*args, progress=after, **options)

    monkeypatch.setattr(training, "train", watched)


def _cut(arguments, monkeypatch, step, number=signal.SIGINT):
    with monkeypatch.context() as patch:
        _during(patch, step, lambda: signal.raise_signal(number))
        assert cli.main(arguments) == 128 + number


def _own_model(out):
    LM2ForCausalLM(command.LM2Config.from_dict({**SIZES, "vocab_size": 9})).save(out)


def _hub_model(out):
    out.mkdir()
    (out / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (out / "model.safetensors").write_bytes(b"weights")
    (out / "tokenizer.json").write_text("{}")


def _weights_alone(out):
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"weights")


def _shards(out):
    out.mkdir()
    (out / "model.safetensors.index.json").write_text("{}")


def _damaged_config(out):
    out.mkdir()
    (out / "config.json").write_text("{")


def _others_run(out):
    out.mkdir()
    (out / "run.json").write_text('{"mine": 1}')


def _others_progress(out):
    for name in ("step-1000", "step-by-step"):
        (out / "progress" / name).mkdir(parents=True)
        (out / "progress" / name / "thesis.txt").write_text("mine")


def _linked_progress(out):
    (out.parent / "theirs" / "step-5").mkdir(parents=True)
    out.mkdir()
    (out / "progress").symlink_to(out.parent / "theirs")


def _own_model_beside_an_index(out):
    _own_model(out)
    (out / "model.safetensors.index.json").write_text("{}")


def _others_lock(out):
    out.mkdir()
    (out / "run.lock").write_text("mine")


def _tokenizer(out):
    out.mkdir()
    (out / "lm2_tokenizer.json").write_text('{"kind": "bytes"}')


def _notes(out):
    out.mkdir()
    (out / "notes.txt").write_text("mine")


def _others_telemetry(out):
    out.mkdir()
    (out / "telemetry.jsonl").write_text('{"step": 1}\n')


def _file(out):
    out.write_text("mine")


THERE = [
    _own_model, _hub_model, _weights_alone, _shards, _damaged_config, _others_run, _notes,
    _others_progress, _linked_progress, _own_model_beside_an_index, _others_lock, _tokenizer,
    _others_telemetry,
]  # fmt: skip
# which --overwrite leaves beside its own
BESIDE = {_notes: "notes.txt", _others_lock: "run.lock"}


@pytest.mark.parametrize("make", [*THERE, _file])
def test_what_is_there_stays(make, text, tmp_path, capsys):
    out = tmp_path / "out"
    make(out)
    before = _tree(tmp_path)
    for more in ([], ["--steps", "0"], ["--lr", "nan"], ["--resume"]):
        _refused(_arguments(text, out, *more), capsys)
        assert _tree(tmp_path) == before


@pytest.mark.parametrize("make", [*THERE, _file])
def test_overwrite_replaces_what_train_wrote(make, text, tmp_path, capsys):
    """And nothing else: where it would have to, it refuses."""
    out = tmp_path / "out"
    make(out)
    before = _tree(tmp_path)
    # not before all is looked at
    for more in (["--steps", "0"], ["--data-dtype", "uint16", "--vocab-size", "3"]):
        _refused([*_arguments(text, out, "--overwrite"), *more], capsys)
        assert _tree(tmp_path) == before
    if make in (_own_model, _tokenizer, *BESIDE):
        assert cli.main(_arguments(text, out, "--overwrite")) == 0
        assert LM2ForCausalLM.load(out).config.vocab_size == 256
        assert make not in BESIDE or (out / BESIDE[make]).read_text() == "mine"
    else:
        message = "is no folder" if make is _file else "is not of train"
        assert message in _refused(_arguments(text, out, "--overwrite"), capsys)
        assert _tree(tmp_path) == before


def test_an_earlier_model_stays_until_the_new_one_is_whole(model, text, monkeypatch, capsys):
    before = _weights(model)
    (model / "progress" / "mine").write_text("mine")

    def stop():
        raise FloatingPointError("the loss of step 5 is nan")

    with monkeypatch.context() as patch:
        _during(patch, 5, stop)
        assert cli.main(_arguments(text, model, "--seed", "8", "--overwrite")) == 2
    assert "the loss of step 5 is nan" in capsys.readouterr().err
    assert all(torch.equal(before[name], tensor) for name, tensor in _weights(model).items())
    assert [path.name for path in (model / "progress").iterdir()] == ["mine"]


def test_what_nobody_saved_as_progress_stays(model, text, capsys):
    """Beside a run's own progress, whatever becomes of that; and parts of killed writes go."""
    theirs = model / "progress" / "step-by-step"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    (model / "model.safetensors.17.part").write_text("left")
    for more in (["--save-every", "3"], []):
        assert cli.main(_arguments(text, model, *more, "--overwrite")) == 0
        assert (theirs / "thesis.txt").read_text() == "mine"
    assert [path.name for path in (model / "progress").iterdir()] == ["step-by-step"]
    assert not list(model.glob("*.part"))


def test_a_batch_without_room_leaves_the_earlier_progress(model, text, capsys):
    before = _tree(model)
    _refused([*_arguments(text, model), "--batch", "1000000000000", "--overwrite"], capsys)
    assert _tree(model) == before


def test_a_link_to_another_model_is_no_way_to_it(model, text, tmp_path):
    best, before = tmp_path / "best", _tree(model)
    best.mkdir()
    for name in ("config.json", "model.safetensors", "lm2_tokenizer.json", "run.json"):
        (best / name).symlink_to(model / name)
    assert cli.main(_arguments(text, best, "--seed", "8", "--overwrite")) == 0
    assert _tree(model) == before
    assert not any(path.is_symlink() for path in best.iterdir())


def test_a_run_is_held_before_it_is_read(model, monkeypatch, capsys):
    """Another one that goes on with it in between would be undone."""
    real, seen = folder.claimed, []

    def claim(*args, **options):
        resumed = ["train", "--out", str(model), "--resume", "--steps", "8"]
        with pytest.raises(OSError, match="in use by another run"):
            command.run_train(command_line(resumed))
        seen.append(True)
        return real(*args, **options)

    command_line = cli._parser().parse_args
    monkeypatch.setattr(folder, "claimed", claim)
    assert cli.main(["train", "--out", str(model), "--resume", "--steps", "7"]) == 0
    assert seen


def test_a_failed_run_leaves_no_folder_on_the_way(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "train", _failing)
    assert cli.main(_arguments(text, tmp_path / "a" / "b" / "c")) == 2
    assert "no room; nothing was saved" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "a").exists()


def _failing(*_, **__):
    raise MemoryError("no room")


@pytest.mark.parametrize(
    "error", (ValueError("theirs"), MemoryError(), RuntimeError("a library's"))
)
def test_a_trained_model_is_saved_somewhere(error, text, tmp_path, monkeypatch, capsys):
    """Whatever it is that its folder has against it."""
    out, other = tmp_path / "out", tmp_path / "elsewhere"
    other.mkdir()
    monkeypatch.setattr(folder.tempfile, "mkdtemp", lambda **_: str(other))
    real = folder.files.save

    def save(place, *args):
        if Path(place) == out:
            raise error
        real(place, *args)

    monkeypatch.setattr(folder.files, "save", save)
    assert cli.main(_arguments(text, out)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"the trained model is in {other} instead" in last and str(error) in last
    assert _weights(other)


def test_an_earlier_model_is_not_said_to_be_the_new_one(model, text, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder.files, "save", full)
    assert cli.main([*_arguments(text, model), "--overwrite"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "nothing was saved" in last and "the model is in" not in last


def test_a_cut_run_is_not_begun_anew(text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    _cut(_arguments(text, out), monkeypatch, 3)
    assert "cut short after step 3: go on with --resume" in _refused(_arguments(text, out), capsys)
    assert cli.main(_arguments(text, out, "--overwrite")) == 0


@pytest.mark.parametrize("save_every", ([], ["--save-every", "2"]))
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
def test_a_run_goes_on_bit_for_bit(text, tmp_path, monkeypatch, capsys, number, save_every):
    """From where a signal ended it, by its own options, data and dropout."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.main(_arguments(text, whole, *save_every)) == 0
    _cut(_arguments(text, cut, *save_every), monkeypatch, 3, number)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "interrupted after step 3 of 6; the progress of step 3 is saved" in last
    assert not (cut / "model.safetensors").exists()
    # once more, in another process so to say
    torch.manual_seed(1)
    _cut(["train", "--out", str(cut), "--resume"], monkeypatch, 5, number)
    assert cli.main(["train", str(text), "--out", str(cut), "--resume"]) == 0
    _equal(cut, whole)
    assert {path.name for path in cut.iterdir()} == {path.name for path in whole.iterdir()}
    # --save-every is remembered, and what was saved otherwise is not gone on with later
    saved = [path.name for path in (cut / "progress").glob("*")]
    assert saved == (["step-6"] if save_every else [])


def test_few_slots_go_on_bit_for_bit(text, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.main(_arguments(text, whole, *FEW_SLOTS)) == 0
    _cut(_arguments(text, cut, *FEW_SLOTS), monkeypatch, 3)
    assert cli.main(["train", "--out", str(cut), "--resume"]) == 0
    _equal(cut, whole)
    config = LM2ForCausalLM.load(cut).config
    assert (config.memory_slots, config.segment_length, config.tokens_per_slot) == (3, 9, 3)
    assert (config.flow, config.memory_causal, config.candidate) == ("time", False, "token")


def test_a_row_is_four_segments(text, tmp_path):
    """Of tokens, however many slots there are."""
    arguments = ["train", str(text), "--config", str(text.with_name("config.json"))]
    arguments += ["--steps", "1", "--batch", "2", "--out"]
    for out, more, length in (("slots", (), 32), ("segments", FEW_SLOTS, 36)):
        assert cli.main([*arguments, str(tmp_path / out), *more]) == 0
        run = json.loads((tmp_path / out / "run.json").read_text())
        assert run["options"]["length"] == length


def test_few_slots_generate(text, tmp_path, capsys):
    """What a trained model goes on with, is what forward over the whole text gives."""
    out = tmp_path / "out"
    assert cli.main(_arguments(text, out, *FEW_SLOTS)) == 0
    capsys.readouterr()
    generate = ["generate", str(out), "--prompt", "the memory", "--tokens", "20"]
    assert cli.main([*generate, "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("the memory")
    model = LM2ForCausalLM.load(out).double().eval()
    ids = model.generate(torch.tensor([list(b"the memory")]), max_new_tokens=20).sequences
    state, steps = None, []
    with torch.no_grad():
        want = model(ids).logits
        for token in ids.split(1, dim=1):
            step = model(token, memory=state, use_cache=True)
            state = step.memory
            steps.append(step.logits)
    assert torch.equal(ids[:, 10:], want[:, 9:-1].argmax(-1))
    assert_round_off(torch.cat(steps, dim=1), want)


def test_who_has_a_token_in_its_candidate(text, tmp_path):
    """Whom nothing else is said of, unless a version saved it that knew of none."""
    config = ["--config", str(text.with_name("config.json"))]
    saved = tmp_path / "saved.json"
    values = json.loads(text.with_name("config.json").read_text())
    assert "candidate" not in values
    saved.write_text(json.dumps(values | {"format": "lm2_kernels.LM2ForCausalLM"}))
    size = ["--size", "tiny", "--slots", "8"]
    arguments = ["train", str(text), "--steps", "1", "--batch", "2", "--length", "8", "--out"]
    for number, (more, wanted) in enumerate(
        (
            (config, "token"),
            ([*config, "--candidate", "read"], "read"),
            (["--config", str(saved)], "read"),
            (["--config", str(saved), "--candidate", "token"], "token"),
            (size, "token"),
            ([*size, "--candidate", "read"], "read"),
        )
    ):
        out = tmp_path / str(number)
        assert cli.main([*arguments, str(out), *more]) == 0
        assert LM2ForCausalLM.load(out).config.candidate == wanted
        assert any("candidate" in name for name in _weights(out)) == (wanted == "token")


def test_a_write_rule_sees_what_it_sees(text, tmp_path):
    """A saved model's configuration says so of its own rule, and another may be asked for."""
    few, many = tmp_path / "few", tmp_path / "many"
    assert cli.main(_arguments(text, few, *FEW_SLOTS)) == 0
    arguments = ["train", str(text), "--config", str(few / "config.json"), "--steps", "1"]
    arguments += ["--batch", "2", "--slots", "9", "--write", "position", "--out"]
    for more, is_causal in (([], True), (["--no-memory-causal"], False)):
        assert cli.main([*arguments, str(many), *more, "--overwrite"]) == 0
        config = LM2ForCausalLM.load(many).config
        assert (config.write, config.memory_causal, config.flow) == ("position", is_causal, "time")
    # the rule that it has already
    again = [*arguments]
    again[again.index("--config") + 1] = str(many / "config.json")
    assert cli.main([*again, str(tmp_path / "again")]) == 0
    assert not LM2ForCausalLM.load(tmp_path / "again").config.memory_causal
    arguments[arguments.index("position")] = "chunk"
    assert cli.main([*arguments, str(many), "--overwrite"]) == 0
    assert not LM2ForCausalLM.load(many).config.memory_causal


def test_a_run_of_an_earlier_version_goes_on(text, tmp_path, monkeypatch):
    """Its configuration knows of one write rule alone, and says nothing of it."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    rule = ("--segment-length", "8", "--write", "position", "--candidate", "read")
    assert cli.main(_arguments(text, whole, *rule)) == 0
    _cut(_arguments(text, cut, *rule), monkeypatch, 3)
    run = json.loads((cut / "run.json").read_text())
    for name in ("segment_length", "write", "memory_causal", "candidate"):
        del run["config"][name]
    (cut / "run.json").write_text(json.dumps(run))
    assert cli.main(["train", "--out", str(cut), "--resume"]) == 0
    _equal(cut, whole)


@pytest.mark.parametrize(
    "option",
    (
        "--size tiny", "--formulation release", "--flow time", "--slots 8", "--segment-length 8",
        "--write position", "--memory-causal", "--no-memory-causal", "--candidate read",
        "--no-memory",
    ),
)  # fmt: skip
def test_a_run_keeps_its_model(option, model, capsys):
    before = _tree(model)
    line = _refused(["train", "--out", str(model), "--resume", *option.split()], capsys)
    assert f"the model as it is: {option.split()[0]} does not fit" in line
    assert _tree(model) == before


def test_more_steps(model, text, capsys):
    assert cli.main(["train", "--out", str(model), "--resume", "--steps", "8"]) == 0
    printed = capsys.readouterr()
    assert "--steps is 8, was 6" in printed.out
    assert "steps 7 to 8" in printed.out
    assert [path.name for path in (model / "progress").iterdir()] == ["step-8"]
    before = _tree(model)
    for steps, message in (("7", "has done 8 steps"), ("0", "--steps must be")):
        resumed = ["train", "--out", str(model), "--resume", "--steps", steps]
        assert message in _refused(resumed, capsys)
    assert _tree(model) == before


@pytest.mark.parametrize("name", [*list(OPTIONS)[1:], "--vocab-size", "--data-dtype"])
def test_a_changed_option_is_named(model, text, capsys, name):
    before = _tree(model)
    changed = {"--dtype": "float32", "--validation": "0.2", "--data-dtype": "uint8"}.get(name, "17")
    resumed = ["train", str(text), "--out", str(model), "--resume"]
    line = _refused([*resumed, name, changed], capsys)
    assert f"{name} of this run is {OPTIONS.get(name)}, got {changed}" in line
    assert _tree(model) == before
    # what has not changed may be said
    if name in OPTIONS:
        assert cli.main([*resumed, name, OPTIONS[name]]) == 0


def test_changed_data_are_named(text, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other.txt"
    other.write_text(TEXT.upper())
    arguments = _arguments(text, out, "--save-every", "2")
    assert cli.main([*arguments[:2], str(other), *arguments[2:]]) == 0
    resumed = ["train", "--out", str(out), "--resume"]
    np.save(tmp_path / "ids.npy", np.tile(np.arange(200), 9))
    before = _tree(out)
    for data, message in (
        ([tmp_path / "ids.npy"], "was trained on text, got token ids"),
        ([text], "was trained on 2 files, got 1"),
        ([other, text], "are in another order"),
        ([text, text], "have changed"),
    ):
        assert message in _refused([*resumed, *map(str, data)], capsys)
        assert _tree(out) == before
    content = other.read_bytes()
    # one byte, of the same file
    other.write_bytes(content[:700] + b"x" + content[701:])
    assert f"have changed: {other}" in _refused(resumed, capsys)
    assert _tree(out) == before
    other.unlink()
    assert "No such file" in _refused(resumed, capsys)
    # the content counts, wherever it is now
    (tmp_path / "moved.txt").write_bytes(content)
    assert cli.main([*resumed, str(text), str(tmp_path / "moved.txt")]) == 0


@pytest.mark.parametrize("content", ("{", "[]", "{}", '{"format": "lm2_kernels run"}'))
def test_a_damaged_run_is_one_line(model, capsys, content):
    (model / "run.json").write_text(content)
    line = _refused(["train", "--out", str(model), "--resume"], capsys)
    assert "run.json" in line


def test_damaged_progress_is_one_line(model, capsys):
    (shard,) = (model / "progress" / "step-6").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:100])
    before = _tree(model)
    capsys.readouterr()
    assert cli.main(["train", "--out", str(model), "--resume"]) == 2
    assert "step-6 is damaged or of another model" in capsys.readouterr().err.splitlines()[-1]
    assert _tree(model) == before


def test_two_runs_do_not_share_a_folder(text, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with folder.locked(out):
        for more in ([], ["--overwrite"]):
            line = _refused(_arguments(text, out, *more), capsys)
            assert "in use by another run" in line
    assert not list(out.iterdir())


def test_where_nothing_can_be_locked_it_is_said(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder.fcntl, "flock", no_locks)
    with folder.locked(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


def _forked(act) -> int:
    """The wait status of a process of its own that does something."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os._exit(act())
        os._exit(99)
    return os.waitpid(child, 0)[1]


def test_a_kill_leaves_what_goes_on(text, tmp_path):
    """At each moment at which a file or folder gets its name or loses it."""
    whole, options = tmp_path / "whole", ("--steps", "3", "--save-every", "2")
    assert cli.main(_arguments(text, whole, *options)) == 0
    for moment in itertools.count():
        cut = tmp_path / f"cut{moment}"
        new = _arguments(text, cut, *options)
        if not _killed(new, moment):
            break
        is_begun = (cut / "run.json").exists()
        arguments = ["train", "--out", str(cut), "--resume"] if is_begun else new
        assert cli.main(arguments) == 0, moment
        _equal(cut, whole)
        assert {path.name for path in cut.iterdir()} == {path.name for path in whole.iterdir()}
        assert [path.name for path in (cut / "progress").iterdir()] == ["step-3"]
    # the last moments are those of the model
    assert moment > 8


@pytest.mark.parametrize("moment", range(2, 6))
def test_a_kill_while_a_model_is_replaced(moment, model, text, tmp_path):
    """Without progress: the model is the old one or the new one, and the run can go on."""
    new = tmp_path / "new"
    assert cli.main(_arguments(text, new, "--seed", "8")) == 0
    options = [*_arguments(text, model, "--seed", "8"), "--overwrite"]
    is_cut = _killed(options, moment)
    if is_cut:
        assert cli.main(["train", "--out", str(model), "--resume"]) == 0
    _equal(model, new)


def _killed(arguments, moment) -> bool:
    """Whether a run came to that moment, at which it was killed."""
    left = [moment]

    def killing(real):
        def call(*args, **options):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*args, **options)

        return call

    def run() -> int:
        os.replace, Path.rename = killing(os.replace), killing(Path.rename)
        shutil.rmtree = killing(shutil.rmtree)
        return cli.main(arguments)

    code = os.waitstatus_to_exitcode(_forked(run))
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize(
    ("size", "save_every", "message"),
    (
        (20_000, "2", "nothing was saved"),
        (20_000, None, "nothing was saved (--save-every)"),
    ),
)
def test_a_full_disk_is_one_line(size, save_every, message, text, tmp_path):
    """By a limit on the size of files, which every writer of files meets as on a full disk."""
    out, said = tmp_path / "out", tmp_path / "said"
    more = ["--save-every", save_every] if save_every else []

    def run() -> int:
        with said.open("w") as sys.stderr:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            return cli.main(_arguments(text, out, *more))

    assert os.waitstatus_to_exitcode(_forked(run)) == 2
    last = said.read_text().splitlines()[-1]
    assert "cannot write" in last and "File too large" in last and message in last
    assert "Traceback" not in said.read_text()
    assert not out.exists()


def test_a_full_disk_at_the_last_save_loses_nothing(text, tmp_path, monkeypatch, capsys):
    """The progress is there, and the model elsewhere."""
    out, other = tmp_path / "out", tmp_path / "elsewhere"
    other.mkdir()
    monkeypatch.setattr(folder.tempfile, "mkdtemp", lambda **_: str(other))
    real = disk.os.fsync

    def full(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.startswith(str(out)) and "model.safetensors" in path:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fsync", full)
        assert cli.main(_arguments(text, out, "--save-every", "4")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    for part in (
        "No space left on device",
        f"the trained model is in {other}",
        "the progress of step 4 is saved: go on with --resume",
    ):
        assert part in last
    assert cli.main(["train", "--out", str(out), "--resume"]) == 0
    _equal(out, other)
    assert not list(tmp_path.rglob("*.part"))


def test_a_full_disk_keeps_the_last_progress(text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        _during(patch, 4, lambda: patch.setattr(Path, "rename", full))
        assert cli.main(_arguments(text, out, "--save-every", "2")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "cannot write" in last and "the progress of step 2 is saved" in last
    assert [path.name for path in (out / "progress").iterdir()] == ["step-2"]
    assert cli.main(["train", "--out", str(out), "--resume"]) == 0


def test_a_closed_terminal_ends_no_run(text, tmp_path, monkeypatch):
    class Closed:
        def isatty(self):
            return False

        def write(self, _):
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stderr", Closed())
    assert cli.main(_arguments(text, tmp_path / "out")) == 0


def test_a_second_signal_does_not_wait(text, tmp_path, monkeypatch, capsys):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    _during(monkeypatch, 3, twice)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert cli.main(_arguments(text, tmp_path / "out", "--save-every", "2")) == 130
    assert "the progress of step 2 is saved" in capsys.readouterr().err.splitlines()[-1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_device_without_memory_leaves_the_progress(text, tmp_path, monkeypatch, capsys):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    _during(monkeypatch, 3, full)
    assert cli.main(_arguments(text, tmp_path / "out", "--save-every", "2")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "Tried to allocate 2 GiB; the progress of step 2 is saved: go on with --resume" in last


def test_a_second_signal_while_progress_is_saved(text, tmp_path, monkeypatch, capsys):
    """Torch's checkpoints wrap whatever ends them."""
    real = filesystem.FileSystemWriter.write_data

    def interrupted(self, *args, **options):
        signal.raise_signal(signal.SIGINT)
        return real(self, *args, **options)

    monkeypatch.setattr(filesystem.FileSystemWriter, "write_data", interrupted)
    _during(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    assert cli.main(_arguments(text, tmp_path / "out")) == 130
    assert "nothing was saved" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_ignored_signal_ends_nothing(text, tmp_path):
    """As of nohup, and of what a shell starts in the background."""

    def run() -> int:
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        real = training.loop.learning_rate

        def hung_up(*args):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGINT)
            return real(*args)

        training.loop.learning_rate = hung_up
        return cli.main(_arguments(text, tmp_path / "out"))

    assert os.waitstatus_to_exitcode(_forked(run)) == 0


def test_a_perplexity_without_end_ends_nothing(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "mean_loss", lambda *_, **__: 1e4)
    assert cli.main(_arguments(text, tmp_path / "out")) == 0
    assert "perplexity inf" in capsys.readouterr().out


def test_a_named_pipe_is_no_data(text, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    line = _refused(["train", str(tmp_path / "pipe"), "--out", str(tmp_path / "out")], capsys)
    assert "is no regular file" in line


def test_a_models_own_configuration_is_taken(model, text, tmp_path, capsys):
    options = ["--steps", "1", "--batch", "2", "--length", "20", "--lr"]
    arguments = ["train", str(text), "--config", str(model / "config.json"), *options]
    assert "and finite, got inf" in _refused(
        [*arguments, "inf", "--out", str(tmp_path / "new")], capsys
    )
    assert cli.main([*arguments, "0.1", "--out", str(tmp_path / "new")]) == 0
    capsys.readouterr()
    assert cli.main(["train", "--out", str(model), "--resume"]) == 0
    assert "all 6 steps are done" in capsys.readouterr().out


def test_a_signal_while_the_model_is_validated(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "mean_loss", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    out = tmp_path / "out"
    assert cli.main(_arguments(text, out)) == 130
    assert f"the model is in {out}" in capsys.readouterr().err.splitlines()[-1]
    assert _weights(out)


@pytest.mark.parametrize("command_line", (["info"], ["verify", "--backend", "eager"], ["demo"]))
def test_ctrl_c_is_one_line_everywhere(command_line, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for name in ("info.collect", "verify.verify.verify", "demo.run"):
        monkeypatch.setattr(f"lm2_kernels.cli.{name}", interrupt)
    assert cli.main(command_line) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"python -m lm2_kernels {command_line[0]}: error: interrupted"


def test_a_model_without_room_is_refused(text, tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "ids.npy", np.tile(np.arange(9), 99))
    arguments = _arguments(tmp_path / "ids.npy", tmp_path / "out")
    for more, message in (
        (["--vocab-size", "2147483647"], "parameters takes"),
        (["--vocab-size", "9223372036854775808"], "vocab_size must be between"),
    ):
        assert message in _refused([*arguments, *more], capsys)
    assert not (tmp_path / "out").exists()


def test_raw_token_ids(tmp_path, text, capsys):
    """As nanoGPT's, against the same ids in an .npy file."""
    ids = np.tile(np.arange(300, dtype="<u2"), 3)
    ids.tofile(tmp_path / "train.bin")
    np.save(tmp_path / "train.npy", ids)
    raw, array = tmp_path / "raw", tmp_path / "array"
    assert "--data-dtype" in _refused(_arguments(tmp_path / "train.bin", raw), capsys)
    assert cli.main(_arguments(tmp_path / "train.bin", raw, "--data-dtype", "uint16")) == 0
    assert cli.main(_arguments(tmp_path / "train.npy", array)) == 0
    _equal(raw, array)
    with pytest.raises(SystemExit):
        cli.main(_arguments(tmp_path / "train.bin", raw, "--dtype", "uint16"))
    assert "for data it is --data-dtype" in capsys.readouterr().err


def _lines(out):
    return [json.loads(line) for line in (out / "telemetry.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("rule", ([], FEW_SLOTS))
def test_telemetry_changes_nothing(rule, text, tmp_path):
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    assert cli.main(_arguments(text, plain, *rule)) == 0
    assert cli.main(_arguments(text, watched, *rule, "--telemetry", "2")) == 0
    _equal(watched, plain)
    lines = _lines(watched)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        # rows of 20 tokens, in segments of eight or nine
        assert (line["segments"], line["tokens"]) == (3, 80)
        assert 1.0 <= line["rank"] <= 9.0 and 0.0 < line["model.layers.1.memory/input_gate"] < 1.0
    assert lines[0]["input_gate"] != lines[1]["input_gate"]
    assert {p.name for p in watched.iterdir()} - {p.name for p in plain.iterdir()} == {
        "telemetry.jsonl"
    }


def test_a_line_without_its_end_is_cut(tmp_path):
    """The next one would be glued to it."""
    lines = ['{"step": 1}\n', '{"step": 2}\n', '{"step": 3}']
    (tmp_path / "telemetry.jsonl").write_text("".join(lines))
    folder.keep_telemetry(tmp_path, 3)
    assert (tmp_path / "telemetry.jsonl").read_text() == "".join(lines[:2])


def test_telemetry_of_a_failed_run_stays(text, tmp_path, monkeypatch, capsys):
    """It may say why; the line says how to do without."""
    out = tmp_path / "out"
    arguments = _arguments(text, out, "--telemetry", "1")
    with monkeypatch.context() as patch:
        _during(patch, 3, _failing)
        assert cli.main(arguments) == 2
    assert [line["step"] for line in _lines(out)] == [1, 2]
    line = _refused(arguments, capsys)
    assert "the telemetry of a run that left nothing else" in line and "--overwrite" in line
    assert cli.main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize("save_every", ([], ["--save-every", "3"]))
def test_telemetry_goes_on(save_every, text, tmp_path, monkeypatch, capsys):
    """A run that was cut and gone on with has the lines of one that was not."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ("--telemetry", "1", *save_every)
    assert cli.main(_arguments(text, whole, *options)) == 0
    if save_every:
        # killed: lines are ahead of the progress, and the last one is there in part

        def stop():
            raise FloatingPointError("no more")

        with monkeypatch.context() as patch:
            _during(patch, 6, stop)
            assert cli.main(_arguments(text, cut, *options)) == 2
        assert [line["step"] for line in _lines(cut)] == [1, 2, 3, 4, 5]
        with (cut / "telemetry.jsonl").open("a") as file:
            file.write('{"step": 6, "segm')
    else:
        _cut(_arguments(text, cut, *options), monkeypatch, 4)
        assert [line["step"] for line in _lines(cut)] == [1, 2, 3, 4]
    capsys.readouterr()
    assert cli.main(["train", "--out", str(cut), "--resume"]) == 0
    assert (cut / "telemetry.jsonl").read_bytes() == (whole / "telemetry.jsonl").read_bytes()
    _equal(cut, whole)
    # how often may be another; and what is begun anew has none of before
    steps = ["train", "--out", str(cut), "--resume", "--steps", "8", "--telemetry", "4"]
    if save_every:
        assert cli.main(steps) == 0
        assert "--telemetry is 4, was 1" in capsys.readouterr().out
        assert [line["step"] for line in _lines(cut)] == [1, 2, 3, 4, 5, 6, 8]
    (cut / "tensorboard").mkdir()
    for name in ("events.out.tfevents.1", "mine"):
        (cut / "tensorboard" / name).touch()
    assert cli.main(_arguments(text, cut, "--overwrite")) == 0
    assert not (cut / "telemetry.jsonl").exists()
    assert [path.name for path in (cut / "tensorboard").iterdir()] == ["mine"]


def test_telemetry_of_nothing_is_refused(text, tmp_path, capsys):
    out = tmp_path / "out"
    for more, message in (
        (["--no-memory"], "--telemetry: the model has no memory layers"),
        (["--telemetry", "0"], "--telemetry must be at least 1"),
    ):
        line = _refused(_arguments(text, out, "--telemetry", *more), capsys)
        assert message in line and not out.exists()


def test_telemetry_for_tensorboard(text, tmp_path, monkeypatch):
    """A stand-in for what is not installed everywhere: what it is asked for."""
    asked = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            asked.append((Path(folder).name, purge_step))
            self.steps = set()

        def add_scalar(self, tag, value, step):
            self.steps.add(step)

        def add_image(self, tag, values, step, dataformats):
            assert values.min() >= 0.0 and step in self.steps

        def close(self):
            asked.append(sorted(self.steps))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setitem(sys.modules, "PIL", types.ModuleType("PIL"))
    out = tmp_path / "out"
    _cut(_arguments(text, out, "--telemetry", "2"), monkeypatch, 5)
    assert cli.main(["train", "--out", str(out), "--resume"]) == 0
    assert asked == [("tensorboard", 1), [2, 4], ("tensorboard", 6), [6]]
