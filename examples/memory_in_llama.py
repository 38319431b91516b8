"""A memory added to a Llama of transformers: trained alone, saved, loaded, taken out again.

A text is two segments. In the first a letter is told, in the second it is asked for. The Llama
learns to answer where it sees both at once. Then it is frozen and sees one segment at a time: only
a memory can tell it the letter. Losses and right answers are printed with the memory carried from
segment to segment, and with an empty one in the second.

With --text FILE the texts are random windows of a file of yours, byte by byte, and all of the
second segment is predicted; the numbers are of the file's last tenth, which is not trained on. How
much the first segment helps there depends on the text, and in so short a training it may be little.

Without --model the Llama is a small one that starts from random weights, so that nothing is
downloaded, and the default run takes some ten seconds. Of a model that is given, the memory alone
is trained.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor

import lm2_kernels as lm2

LETTERS, NOISE, ASK = b"abcdefgh", ord("."), ord("?")
Texts = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # -> ids, labels (B, 2, L)


def told_and_asked(length: int) -> Texts:
    """Texts whose last byte is a letter of the first segment: this one is to be predicted."""

    def texts(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        ids = torch.full((batch, 2, length), NOISE)
        letter = torch.tensor(list(LETTERS))[
            torch.randint(len(LETTERS), (batch,), generator=generator)
        ]
        ids[:, 0, length // 2] = letter
        ids[:, 1, -2] = ASK
        ids[:, 1, -1] = letter
        labels = torch.full_like(ids, -100)
        labels[:, 1, -1] = letter
        return ids, labels

    return texts


def windows(data: Tensor, length: int) -> Texts:
    """Random windows of bytes; the second segment is to be predicted."""

    def texts(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(data) - 2 * length + 1, (batch, 1), generator=generator)
        ids = data[starts + torch.arange(2 * length)].view(batch, 2, length)
        labels = ids.clone()
        labels[:, 0] = -100
        return ids, labels

    return texts


def read_at_once(model: torch.nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both segments in one window -> loss, and the logits of the second one."""
    output = model(ids.flatten(1), labels=labels.flatten(1))
    return output.loss, output.logits[:, ids.shape[2] :]


def read_in_turn(
    model: torch.nn.Module, ids: Tensor, labels: Tensor, carry: bool = True
) -> tuple[Tensor, Tensor]:
    """One segment, then the other -> the same. Without ``carry`` the memory is emptied between."""
    memory = lm2.get_memory(model)
    memory.carry = True
    memory.reset()
    model(ids[:, 0])
    if not carry:
        memory.reset()
    output = model(ids[:, 1], labels=labels[:, 1])
    memory.reset()
    memory.carry = False
    return output.loss, output.logits


def train(
    model: torch.nn.Module,
    read: Callable[..., tuple[Tensor, Tensor]],
    texts: Texts,
    optimizer: torch.optim.Optimizer,
    steps: int,
) -> None:
    """Some steps, of 32 texts each."""
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(1, steps + 1):
        loss, _ = read(model, *texts(32, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps:
            print(f"  step {step} of {steps}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def score(model: torch.nn.Module, texts: Texts, read: Callable, **options: bool) -> str:
    """Loss, and the share of right answers, on texts that were not trained on."""
    ids, labels = texts(200, torch.Generator().manual_seed(1))
    loss, logits = read(model.eval(), ids, labels, **options)
    wanted = labels[:, 1, 1:]
    right = (logits[:, :-1].argmax(-1) == wanted)[wanted != -100].double().mean()
    return f"loss {loss.item():.3f}, {100 * right:.1f} % right"


def report_scores(model: torch.nn.Module, texts: Texts, when: str) -> None:
    """With the memory, and without what it carries."""
    for name, carry in (("memory carried", True), ("not carried", False)):
        print(f"{when}, {name}: {score(model, texts, read_in_turn, carry=carry)}", flush=True)


def host(name: str | None, texts: Texts, steps: int) -> transformers.PreTrainedModel:
    """The model to give a memory to."""
    if name is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(name)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.125,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    print("the Llama learns, both segments in one window")
    train(model, read_at_once, texts, torch.optim.AdamW(model.parameters(), lr=3e-3), steps)
    return model


def main() -> None:
    """Add, train, save, load and remove."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or name for from_pretrained")
    parser.add_argument("--text", type=Path, metavar="FILE", help="to learn from, byte by byte")
    parser.add_argument("--segment-length", type=int, default=16, help="bytes, and slots")
    parser.add_argument("--host-steps", type=int, default=200, help="of the Llama, without --model")
    parser.add_argument("--steps", type=int, default=150, help="of the memory")
    parser.add_argument("--out", help="a folder for the model; a temporary one unless given")
    options = parser.parse_args()
    length = options.segment_length
    if length < 2:
        parser.error("--segment-length must be at least 2: a question and its answer")
    if options.text is not None and not options.text.is_file():
        parser.error(f"there is no file {options.text}")
    torch.manual_seed(0)
    texts = kept = told_and_asked(length)
    if options.text is not None:
        data = torch.tensor(list(options.text.read_bytes()))
        if len(data) < 20 * length:
            parser.error(f"--text needs {20 * length} bytes at least, got {len(data)}")
        seen = len(data) * 9 // 10
        texts, kept = (windows(part, length) for part in (data[:seen], data[seen:]))
    model = host(options.model, texts, options.host_steps)
    print(f"both in one window: {score(model, kept, read_at_once)}")
    ids, _ = kept(2, torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = model(ids.flatten(1)).logits

    report = lm2.add_memory(model, memory_slots=length, num_heads=4)
    print(report)
    with torch.no_grad():
        after = model(ids.flatten(1)).logits
    print("changed at first:", (after - before).abs().max().item())
    report_scores(model, kept, "before training")
    print("the memory learns, one segment after the other")
    optimizer = torch.optim.AdamW(report.parameter_groups(lr=1e-2))
    train(model, read_in_turn, texts, optimizer, options.steps)
    report_scores(model, kept, "after training")

    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = Path(options.out or temporary)
        model.save_pretrained(folder)
        # transformers tells that it does not know the memory's weights: load_memory takes them
        again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        lm2.load_memory(again, folder)
        difference = (again(ids[:, 0]).logits - model(ids[:, 0]).logits).abs().max().item()
        print("changed by saving and loading:", difference)
        lm2.get_memory(again).carry = True
        again(ids[:1, 0])
        answered = again.generate(ids[:1, 1, :-1], max_new_tokens=1, do_sample=False)
        print("read:", bytes(ids[0, 0].tolist()))
        print("then:", bytes(ids[0, 1, :-1].tolist()))
        print(f"answer: {chr(answered[0, -1])!r}, true: {chr(ids[0, 1, -1])!r}")
        lm2.remove_memory(model)
        print("changed at last:", (model(ids.flatten(1)).logits - before).abs().max().item())


if __name__ == "__main__":
    main()
