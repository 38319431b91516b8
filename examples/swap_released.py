"""Our layer in the place of one that computes the way the LM2 authors' released code does.

With a model of the released code, `lm2.swap_memory(model)` is the one line to add. Here stands a
module with the same parts, from the benchmarks.
"""

import argparse
import copy
import time

import torch
from torch import Tensor, nn

import lm2_kernels as lm2
from lm2_kernels.bench.peers import ReleasedStyleMemory


def seconds(model: nn.ModuleDict, x: Tensor, memory: Tensor, rounds: int) -> float:
    """The fastest of some training steps."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        output, new_memory = model["memory"](x, memory)
        (output.square().mean() + new_memory.square().mean()).backward()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Swap, compare the results, the gradients and the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="tokens = slots = width")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    released = nn.ModuleDict({"memory": ReleasedStyleMemory(options.size, options.heads)})
    swapped = copy.deepcopy(released)
    print(lm2.swap_memory(swapped))
    x = torch.randn(options.batch, options.size, options.size)
    memory = lm2.initial_memory(options.batch, options.size, options.size)
    before = seconds(released, x, memory, options.rounds)
    after = seconds(swapped, x, memory, options.rounds)
    print(f"forward and backward: {1e3 * before:.1f} ms before, {1e3 * after:.1f} ms after")
    # what is equal is compared in float64
    for model in (released, swapped):
        model.double().zero_grad()
        output, _ = model["memory"](x.double(), memory.double())
        output.square().sum().backward()
    pairs = zip(released.parameters(), swapped.parameters(), strict=True)
    difference = max((ours.grad - theirs.grad).abs().max().item() for theirs, ours in pairs)
    largest = max(parameter.grad.abs().max().item() for parameter in released.parameters())
    print(f"largest difference of gradients: {difference / largest:.1e} of the largest")
    lm2.remove_memory(swapped)
    print("taken out again:", type(swapped["memory"]).__name__)


if __name__ == "__main__":
    main()
