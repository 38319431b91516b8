"""A long document read in pieces, its state saved and loaded half-way, as if nothing had happened.

Without --model the model has random weights, and takes about 8 bits for a byte. The document is
this file unless another is given.
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import lm2_kernels as lm2


def load_model(folder: str | None) -> lm2.LM2ForCausalLM:
    """What `python -m lm2_kernels train text.txt` wrote, or a small model."""
    if folder is not None:
        return lm2.LM2ForCausalLM.load(folder).eval()
    config = lm2.LM2Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, memory_slots=64, memory_heads=4,
    )  # fmt: skip
    return lm2.LM2ForCausalLM(config).eval()


def bits(logits: Tensor, ids: Tensor) -> Tensor:
    """Of each byte but the first (L - 1,), by the logits (L, V) at the byte before."""
    chosen = logits[:-1].double().log_softmax(-1).gather(1, ids[1:, None])
    return -chosen[:, 0] / math.log(2.0)


@torch.no_grad()
def main() -> None:
    """Read in pieces and at once, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", nargs="?", type=Path, default=Path(__file__))
    parser.add_argument("--model", help="a folder that `train` wrote from text")
    parser.add_argument("--piece", type=int, default=100, help="bytes at a time")
    parser.add_argument("--limit", type=int, default=20_000, help="bytes to read at most")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = load_model(options.model)
    ids = torch.tensor([list(options.document.read_bytes()[: options.limit])])
    pieces = ids.split(options.piece, dim=1)
    state, logits = None, []
    for number, piece in enumerate(pieces):
        # the piece may begin and end anywhere in a segment
        step = model(piece, memory=state, use_cache=True)
        state = step.memory
        logits.append(step.logits[0])
        if number == len(pieces) // 2:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "state.safetensors"
                state.save(path)
                state = lm2.MemoryState.load(path)
                print(f"saved and loaded {path.stat().st_size:,} bytes: {state}")
    streamed = bits(torch.cat(logits), ids[0])
    at_once = bits(model(ids).logits[0], ids[0])
    print(f"{ids.shape[1]} bytes in {len(pieces)} pieces: {streamed.mean():.4f} bits a byte")
    print(f"largest difference to one pass: {(streamed - at_once).abs().max():.1e} bits")


if __name__ == "__main__":
    main()
