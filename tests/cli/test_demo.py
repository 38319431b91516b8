"""The demo: what it writes and prints, its honest comparison, and the layer swapped in."""

import json
import sys
import types

import pytest
import torch

from lm2_kernels import LM2ForCausalLM, cli, telemetry
from lm2_kernels.bench.peers import ReleasedStyleMemory
from lm2_kernels.cli import demo
from lm2_kernels.evaluation.accuracy import Accuracy
from lm2_kernels.layers.release import ReleaseMemory
from lm2_kernels.training.data import load_tokenizer
from tools.rounding import ROUND_OFF_ULPS, assert_round_off


def test_run(tmp_path, monkeypatch, capsys):
    """A few steps: every file, every number, and the same data for both models."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(demo, "compare_with_released", lambda: [])
    seen = []
    real = demo.train

    def watch(model, batches, **options):
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        options.pop("progress")
        seen.append((model, start, list(batches), options))
        return real(model, batches, **options)

    monkeypatch.setattr(demo, "train", watch)
    monkeypatch.setattr(demo, "VALIDATION", 20)
    assert cli.main(["demo", "--out", str(tmp_path), "--steps", "3"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "with memory",
        "without",
        "commonest answer",
        "place named last",
        "losses.png",
        "reads.png",
    ):
        assert text in printed
    assert "about 20 stories" in printed
    (ours, start, data, options), (plain, same_start, same, same_options) = seen
    assert options == same_options
    for a, b in zip(data, same, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("input_ids", "labels"))
    assert ours.memory_layers()
    assert not plain.memory_layers()
    # all that is not memory starts alike
    for name, tensor in same_start.items():
        assert torch.equal(tensor, start[name]), name
    report = json.loads((tmp_path / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["with memory", "without"]
    assert len(report["models"][0]["losses"]) == 3
    for name in ("losses", "reads"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text("utf-8")
    # the printed command asks the saved model
    command = next(line for line in printed.splitlines() if "--prompt" in line)
    prompt = command.split("'")[1]
    arguments = ["--temperature", "0", "--tokens", "2", "--prompt", prompt]
    assert cli.main(["generate", str(tmp_path / "model"), *arguments]) == 0
    answered = capsys.readouterr().out.split()
    assert len(answered) == len(prompt.split()) + 2
    assert f"{answered[-2]} {answered[-1]}  (true:" in printed
    words = load_tokenizer(tmp_path / "model").words
    assert words == demo.TASK.vocabulary.words
    assert LM2ForCausalLM.load(tmp_path / "model").config.vocab_size == len(words)


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = demo.run(tmp_path, steps=1, validation=5)
    assert report.plots == []
    assert 'pip install "lm2_kernels[demo]"' in demo.render(report)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "report.json"}


def test_the_picture_of_reads_says_which_sentence_is_read(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    drawn = []
    monkeypatch.setattr(demo.figures, "save", lambda figure, path: drawn.append(figure))
    model, _ = demo._models(0)
    example = next(demo.TASK.examples(5, hops=2))
    (question,) = example.questions
    said = demo.Answer("", "", f"lucy {question.answer[1]}", "", "")
    demo._plot_reads(model, example, said, tmp_path / "reads")
    (figure,) = drawn
    assert figure.get_suptitle() == f"where is {question.subject}? {said.answer}"
    # the question's segment with the answer as it was said
    ids = demo.TASK.collate([example])["input_ids"]
    ids[0, -2] = demo.TASK.vocabulary.encode("lucy")[0]
    words = demo.TASK.vocabulary.decode(ids[0].tolist()).split()
    with telemetry.watch(model) as record:
        model(ids)
    assert [axes.get_title("left") for axes in figure.axes] == ["block 0", "block 1"]
    for axes, weights in zip(figure.axes, record.reads().values(), strict=True):
        rows = [label.get_text() for label in axes.get_yticklabels()]
        assert rows == words[-4:-1] == ["where", question.subject, "lucy"]
        texts = [text.get_text() for text in axes.texts]
        wanted = weights[-4:-1].flatten().tolist()
        assert texts == [f"{weight:.2f}" for weight in wanted]
    # three tokens of the story's segment to a slot
    told = [" ".join(words[i : i + 3]) for i in range(0, 24, 3)]
    slots = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
    assert slots == [text if "<pad>" not in text else "(nothing)" for text in told]


def test_accuracy_follows_the_models_own_first_word():
    """The place counts, after the holder that the model names itself."""
    examples = {
        hops: [next(demo.TASK.examples(seed, hops=hops)) for seed in range(30)] for hops in (1, 2)
    }

    class Knows(torch.nn.Module):
        """Answers from the text; ``wrong`` names another holder, and so another place."""

        def __init__(self, hops, wrong):
            super().__init__()
            self.hops, self.wrong = hops, wrong
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids):
            logits = torch.zeros(*ids.shape, demo.TASK.vocabulary.vocab_size)
            for row, tokens in enumerate(ids.tolist()):
                words = demo.TASK.vocabulary.decode(tokens).split()
                facts = [words[n : n + 3] for n in range(0, 18, 3)]
                latest = {subject: last for subject, _, last in facts}
                for place, word in enumerate(words[24:], start=24):
                    answer = latest.get(word)
                    if answer is not None and self.wrong and self.hops == 2 and place == 46:
                        answer = next(p for p in ("mary", "john", "sandra") if p != answer)
                    if answer is not None:
                        logits[row, place, demo.TASK.vocabulary.encode(answer)[0]] = 1.0
            return types.SimpleNamespace(logits=logits)

    for hops, asked in examples.items():
        assert demo._accuracy(Knows(hops, False), asked) == Accuracy(30, 30)
    assert demo._accuracy(Knows(2, True), examples[2]).right < 30


@pytest.mark.parametrize("size", (16, 24))
def test_swapped_layer_is_equal(size):
    (row,) = demo.compare_with_released((size,), num_heads=2, rounds=1)
    assert row.size == size
    assert row.difference < ROUND_OFF_ULPS * torch.finfo(torch.float64).eps
    assert row.forward > 0 < row.training
    text = demo.render_comparison([row])
    assert f"{size}" in text
    # the comparison's own layer is the released formulation
    theirs, ours = ReleasedStyleMemory(size, 2).double(), ReleaseMemory(size, 2).double()
    theirs.load_state_dict(ours.state_dict())
    x, memory = torch.randn(2, 2, size, size).double()
    for got, want in zip(theirs(x, memory), ours(x, memory), strict=True):
        assert_round_off(got, want)


@pytest.mark.parametrize("name", ("report.json", "losses.png", "losses.svg", "reads.svg", "model"))
def test_what_no_demo_wrote_stays(tmp_path, capsys, name):
    path = tmp_path / name
    if name == "model":
        path.mkdir()
        path /= "config.json"
    path.write_text("{}")
    assert cli.main(["demo", "--out", str(tmp_path), "--steps", "1"]) == 2
    assert f"holds {name}, which is not of an earlier demo" in capsys.readouterr().err
    assert path.read_text() == "{}"
    assert cli.main(["demo", "--out", str(path), "--steps", "1"]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_an_earlier_demo_is_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        demo.run(tmp_path, steps=1, validation=5)
    assert (tmp_path / "notes.txt").read_text() == "mine"
