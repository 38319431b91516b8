"""A small LM2 learns from nothing to remember, beside the same model without memory.

A row is two segments: in the first a letter is told among others that do not matter, in the second
it is asked for. Self-attention ends at the segment, so that without memory nobody can do better
than guess.
"""

import argparse
import math
from collections.abc import Iterator

import torch
from torch import Tensor

import lm2_kernels as lm2
from lm2_kernels.training import train

LETTERS = 8
ASK, NOISE = LETTERS, LETTERS + 1


def batches(batch: int, length: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches without end; only the last token of a row is predicted."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.full((batch, 2 * length), NOISE)
        letter = torch.randint(LETTERS, (batch, 1), generator=generator)
        ids[:, length // 2 : length // 2 + 1] = letter
        ids[:, -2] = ASK
        ids[:, -1:] = letter
        labels = torch.full_like(ids, -100)
        labels[:, -1] = ids[:, -1]
        yield {"input_ids": ids, "labels": labels}


def show(done: int, total: int, loss: float) -> None:
    """Every 50 steps, where training is."""
    if done % 50 == 0 and done < total:
        print(f"  step {done} of {total}: loss {loss:.3f}", flush=True)


def main() -> None:
    """Train both, and print their losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--segment-length", type=int, default=16, help="tokens, and slots")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", help="a folder for the model with memory")
    options = parser.parse_args()
    print(f"two models, {options.steps} steps each: some seconds, up to a minute on a busy machine")
    print(f"who guesses has a loss of {math.log(LETTERS):.2f}", flush=True)
    for name, layers in (("with memory", None), ("without", ())):
        torch.manual_seed(0)
        config = lm2.LM2Config(
            vocab_size=LETTERS + 2, hidden_size=options.hidden,
            intermediate_size=2 * options.hidden, num_hidden_layers=options.layers,
            num_attention_heads=4, memory_slots=options.segment_length, memory_heads=4,
            memory_layers=layers, initializer_range=0.125,
        )  # fmt: skip
        model = lm2.LM2ForCausalLM(config)
        source = batches(options.batch, options.segment_length, seed=0)
        print(f"{name}:", flush=True)
        losses = train(model, source, steps=options.steps, lr=options.lr, warmup=10, progress=show)
        last = losses[-10:]
        print(f"  loss {losses[0]:.2f}, at last {sum(last) / len(last):.3f}", flush=True)
        if options.out and layers is None:
            model.save(options.out)


if __name__ == "__main__":
    main()
