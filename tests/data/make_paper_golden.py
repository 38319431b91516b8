"""Golden tensors of the paper's memory layer, from an implementation that shares no code with ours.

One number at a time: Python loops over tokens, slots, heads and channels, with float64 vectors only
inside a dot product, and autograd for the gradients. Written from arXiv 2502.06049, equations 1 to
6, and the definitions of slot offset and slot mask; imports torch and safetensors alone.

    python tests/data/make_paper_golden.py      # rewrites it in lm2_kernels/testing/golden
"""

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

BATCH, TOKENS, SLOTS, WIDTH, HEADS, OFFSET = 2, 5, 9, 12, 3, 2
PROJECTIONS = ("query", "key", "value", "output_gate", "input_gate", "forget_gate")
TARGET = Path(__file__).parents[2] / "lm2_kernels/testing/golden/paper_d12_h3.safetensors"


def project(weight, vector):
    """``y_j = sum_i W[j, i] v_i``, as nn.Linear has it."""
    return [(weight[j] * vector).sum() for j in range(WIDTH)]


def sigmoid(z):
    return 1.0 / (1.0 + torch.exp(-z))


def tanh(z):
    return (torch.exp(z) - torch.exp(-z)) / (torch.exp(z) + torch.exp(-z))


def read_slots(query, keys, values, visible):
    """Equations 1 and 2 for one token: attention over the visible slots, head by head."""
    head_width = WIDTH // HEADS
    read = []
    for head in range(HEADS):
        channels = range(head * head_width, (head + 1) * head_width)
        weights = {}
        for slot in visible:
            score = sum(query[c] * keys[slot][c] for c in channels) / math.sqrt(head_width)
            weights[slot] = torch.exp(score)
        total = sum(weights.values())
        for c in channels:
            # a token that sees no slot reads 0
            weighted = sum(weights[slot] * values[slot][c] for slot in visible)
            read.append(weighted / total if visible else torch.zeros((), dtype=torch.float64))
    return read


def layer(x, memory, slot_mask, weights):
    """Output (B, T, D) and new memory (B, N, D)."""
    outputs, memories = [], []
    for b in range(BATCH):
        keys = [project(weights["key"], memory[b, j]) for j in range(SLOTS)]
        values = [project(weights["value"], memory[b, j]) for j in range(SLOTS)]
        rows = [memory[b, j] for j in range(SLOTS)]
        for t in range(TOKENS):
            token, old = x[b, t], memory[b, OFFSET + t]
            visible = [j for j in range(SLOTS) if j <= OFFSET + t and slot_mask[b, j]]
            read = read_slots(project(weights["query"], token), keys, values, visible)
            output_gate = project(weights["output_gate"], torch.stack(read))
            input_gate = project(weights["input_gate"], token)
            forget_gate = project(weights["forget_gate"], torch.stack(read))
            output, row = [], []
            for c in range(WIDTH):
                # equation 3, and what the block adds to its stream
                output.append(token[c] + sigmoid(output_gate[c]) * read[c])
                # equations 4, 5 and 6
                row.append(
                    sigmoid(input_gate[c]) * tanh(read[c]) + sigmoid(forget_gate[c]) * old[c]
                )
            outputs.append(torch.stack(output))
            rows[OFFSET + t] = torch.stack(row)
        memories.append(torch.stack(rows))
    return torch.stack(outputs).view(BATCH, TOKENS, WIDTH), torch.stack(memories)


def main(target: Path = TARGET) -> None:
    """Draw the inputs, differentiate, save."""
    generator = torch.Generator().manual_seed(2502)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = {name: draw(WIDTH, WIDTH) / math.sqrt(WIDTH) for name in PROJECTIONS}
    x, memory = draw(BATCH, TOKENS, WIDTH), draw(BATCH, SLOTS, WIDTH)
    cotangents = draw(BATCH, TOKENS, WIDTH), draw(BATCH, SLOTS, WIDTH)
    # row 1 alone is masked, and its first token sees nothing
    slot_mask = torch.ones(BATCH, SLOTS, dtype=torch.bool)
    slot_mask[1, [0, 1, 2, 5]] = False

    leaves = [x, memory, *weights.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    results = layer(x, memory, slot_mask, weights)
    gradients = torch.autograd.grad(results, leaves, cotangents)

    parameters = [f"{name}_proj.weight" for name in PROJECTIONS]
    tensors = {
        "inputs.x": x,
        "inputs.memory": memory,
        "inputs.slot_mask": slot_mask,
        "outputs.y": results[0],
        "outputs.memory": results[1],
        "cotangents.y": cotangents[0],
        "cotangents.memory": cotangents[1],
    }
    for name, weight in zip(parameters, weights.values(), strict=True):
        tensors[f"weights.{name}"] = weight
    for name, gradient in zip(["x", "memory", *parameters], gradients, strict=True):
        tensors[f"grads.{name}"] = gradient
    metadata = {
        "formulation": "paper",
        "heads": HEADS,
        "batch": BATCH,
        "slots": SLOTS,
        "topk": 0,
        "slot_offset": OFFSET,
        "output": "read",
    }
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        target,
        {name: str(value) for name, value in metadata.items()},
    )
    # safetensors writes through a temporary file, readable by its owner alone
    target.chmod(0o644)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
