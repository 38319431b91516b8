"""The memory layer in a Transformer block of your own, trained to recall an earlier segment.

The block reads a segment of random vectors, then a segment of zeros, in which it has to give the
vectors back. Its self-attention ends at the segment: what it knows of the first one is in the
memory. Who only knows the vectors' mean has an error of 1.
"""

import argparse

import torch
from torch import Tensor, nn

import lm2_kernels as lm2


class Block(nn.Module):
    """Self-attention, the memory on its output, an MLP."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.memory = lm2.PaperMemory(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """A segment (B, T, D) and the memory (B, N, D) -> the same, after the block."""
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        normed = self.norms[0](x)
        attended, _ = self.attention(normed, normed, normed, attn_mask=later, need_weights=False)
        attended, memory = self.memory(attended, memory)
        x = x + attended
        return x + self.mlp(self.norms[1](x)), memory


def main() -> None:
    """Train, and print the error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4, help="of a segment, and slots")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    block = Block(options.dim, options.heads)
    optimizer = torch.optim.AdamW(block.parameters(), lr=options.lr)
    for step in range(1, options.steps + 1):
        told = torch.randn(options.batch, options.tokens, options.dim)
        memory = lm2.initial_memory(options.batch, options.tokens, options.dim)
        _, memory = block(told, memory)  # the first segment: only its memory is kept
        recalled, _ = block(torch.zeros_like(told), memory)
        loss = (recalled - told).square().mean()
        optimizer.zero_grad()
        loss.backward()  # through the memory, into the first segment
        optimizer.step()
        if step in (1, options.steps) or step % 100 == 0:
            print(f"step {step}: error {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
