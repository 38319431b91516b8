"""A memory added to a Llama of transformers: trained alone, saved, loaded, taken out again.

Without --model the Llama is a small one with random weights, so that nothing is downloaded.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import transformers

import lm2_kernels as lm2


def load_host(name: str | None) -> transformers.PreTrainedModel:
    """The model to give a memory to."""
    if name is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(name)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def main() -> None:
    """Add, train, save, load and remove."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or name for from_pretrained")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--length", type=int, default=96, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", help="a folder for the model; a temporary one unless given")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = load_host(options.model)
    ids = torch.randint(model.config.vocab_size, (2, options.length))
    with torch.no_grad():
        before = model.eval()(ids).logits
    report = lm2.add_memory(model, memory_slots=options.slots, num_heads=4)
    print(report)
    with torch.no_grad():
        print("changed at first:", (model(ids).logits - before).abs().max().item())
    optimizer = torch.optim.AdamW(report.parameter_groups(lr=1e-2))
    for step in range(1, options.steps + 1):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (1, options.steps):
            print(f"step {step}: loss {loss.item():.3f}")
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = Path(options.out or temporary)
        model.save_pretrained(folder)
        # transformers tells that it does not know the memory's weights: load_memory takes them
        again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        lm2.load_memory(again, folder)
        difference = (again(ids).logits - model(ids).logits).abs().max().item()
        print("changed by saving and loading:", difference)
        print(again.generate(ids[:1, :8], max_new_tokens=8, do_sample=False)[0].tolist())
        lm2.remove_memory(model)
        print("changed at last:", (model(ids).logits - before).abs().max().item())


if __name__ == "__main__":
    main()
