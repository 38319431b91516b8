"""LoRA and a memory in one Llama: trained together, saved as one adapter, loaded, merged.

A text is two segments. In the first a letter is told, in the second it is asked for, as in
memory_in_llama.py: only a memory can tell it. LoRA adapts the Llama to it; the memory, which PEFT
saves with the adapter, is trained whole. Both are then loaded into a fresh Llama, and merged.

Without --model the Llama is a small one that first learns the letters, so that nothing is
downloaded, and the default run takes some ten seconds.
"""

import argparse
import copy
import tempfile
from collections.abc import Iterable
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

import lm2_kernels as lm2

LETTERS = torch.tensor(list(b"abcdefgh"))


def texts(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """A letter told, and asked for at the end -> ids (B, 2, L), the letters (B,)."""
    ids = torch.full((batch, 2, length), ord("."))
    letters = LETTERS[torch.randint(len(LETTERS), (batch,))]
    ids[:, 0, length // 2] = ids[:, 1, -1] = letters
    ids[:, 1, -2] = ord("?")
    return ids, letters


def read_at_once(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of the answer, both segments in one window. (B, V)"""
    return model(input_ids=ids.flatten(1)).logits[:, -2]


def read_in_turn(model: nn.Module, ids: Tensor) -> Tensor:
    """The same, one segment after the other: the memory is carried over."""
    memory = lm2.get_memory(model)
    memory.carry = True
    model(input_ids=ids[:, 0])
    logits = model(input_ids=ids[:, 1]).logits[:, -2]
    memory.carry = False
    memory.reset()
    return logits


def train(model: nn.Module, read, parameters: Iterable[Tensor], steps: int, length: int) -> None:
    """Some steps, of 32 texts each."""
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    model.train()
    for step in range(1, steps + 1):
        ids, letters = texts(32, length)
        loss = nn.functional.cross_entropy(read(model, ids), letters)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps:
            print(f"  step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval()


def host(name: str | None, steps: int, length: int) -> transformers.PreTrainedModel:
    """The model to give a memory and adapters to."""
    if name is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(name)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.125,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    print("the Llama learns, both segments in one window")
    train(model, read_at_once, model.parameters(), steps, length)
    return model


def main() -> None:
    """Add, adapt, train, save, load and merge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or name for from_pretrained")
    parser.add_argument("--segment-length", type=int, default=16, help="tokens, and slots")
    parser.add_argument("--host-steps", type=int, default=150, help="of the Llama, without --model")
    parser.add_argument("--steps", type=int, default=150, help="of LoRA and the memory")
    parser.add_argument("--out", type=Path, help="a folder; a temporary one unless given")
    options = parser.parse_args()
    length = options.segment_length
    torch.manual_seed(0)
    fresh = host(options.model, options.host_steps, length)

    model = copy.deepcopy(fresh)
    # the memory first: an adapter's files hold what is there when it comes
    lm2.add_memory(model, memory_slots=length, num_heads=4)
    lora = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], modules_to_save=["memory"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora)
    model.print_trainable_parameters()
    print("LoRA and the memory learn, one segment after the other")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train(model, read_in_turn, trained, options.steps, length)

    ids, letters = texts(200, length)
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        wanted = read_in_turn(model, ids)
        print(f"right: {(wanted.argmax(-1) == letters).float().mean().item():.0%}")
        with model.disable_adapter():
            logits = read_in_turn(model, ids)
            print(f"without both: {(logits.argmax(-1) == letters).float().mean().item():.0%}")
        folder = options.out or Path(temporary)
        model.save_pretrained(folder)
        lm2.add_memory(fresh, memory_slots=length, num_heads=4)
        again = peft.PeftModel.from_pretrained(fresh, folder).eval()
        difference = (read_in_turn(again, ids) - wanted).abs().max().item()
        print("changed by saving and loading:", difference)
        merged = again.merge_and_unload()
        print("changed by merging:", (read_in_turn(merged, ids) - wanted).abs().max().item())


if __name__ == "__main__":
    main()
