"""``python -m lm2_kernels generate``: a trained model goes on with a prompt."""

import argparse

import torch
from torch import Tensor

from lm2_kernels.cli.arguments import seed
from lm2_kernels.machine import best_device
from lm2_kernels.model.decoder import LM2ForCausalLM
from lm2_kernels.training.data import load_tokenizer


def add_generate(commands: argparse._SubParsersAction) -> None:
    """The ``generate`` command's arguments."""
    parser = commands.add_parser("generate", help="let a trained model go on with a prompt")
    parser.add_argument(
        "model", help="the folder that train or demo wrote, or user/model on the Hugging Face Hub"
    )
    parser.add_argument("--prompt", required=True, help="text, or token ids for token arrays")
    parser.add_argument("--tokens", type=int, default=200, help="how many to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=seed, default=0)
    parser.set_defaults(run=run_generate)


def run_generate(options: argparse.Namespace) -> int:
    """Print a prompt and what follows, as it comes."""
    device = best_device()
    model = LM2ForCausalLM.load(options.model, device=device).eval()
    tokenizer = load_tokenizer(options.model)
    prompt = tokenizer.encode(options.prompt)
    if not prompt:
        raise ValueError("--prompt is empty")
    if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
        raise ValueError(
            f"--prompt: the model knows the token ids 0 to {model.config.vocab_size - 1}"
        )
    if not options.temperature >= 0.0:
        raise ValueError(f"--temperature must be 0 or more, got {options.temperature}")
    if options.temperature == 0.0 and (options.top_k, options.top_p) != (None, None):
        raise ValueError("--top-k and --top-p are for a --temperature above 0")
    sampling = {}
    if options.temperature > 0.0:
        sampling = {
            "do_sample": True,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "generator": torch.Generator(device).manual_seed(options.seed),
        }
    written, tokens = "", list(prompt)

    def show(token: Tensor) -> None:
        nonlocal written
        tokens.append(token.item())
        text = tokenizer.decode(tokens)
        # the last bytes of a character that is not complete would be printed wrong
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(written) :], end="", flush=True)
            written = text

    model.generate(
        torch.tensor([prompt], device=device),
        max_new_tokens=options.tokens,
        on_token=show,
        **sampling,
    )
    print(tokenizer.decode(tokens)[len(written) :])
    return 0
