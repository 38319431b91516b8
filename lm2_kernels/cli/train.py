"""``python -m lm2_kernels train``: a model from text files or token arrays."""

import argparse
import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import torch

from lm2_kernels import training
from lm2_kernels.model.config import LM2Config
from lm2_kernels.model.decoder import LM2ForCausalLM
from lm2_kernels.state.files import WEIGHTS, load_config, save_config
from lm2_kernels.terminal import StepBar
from lm2_kernels.training import distributed
from lm2_kernels.training.data import Bytes, Corpus, save_tokenizer

# the state of a run that --resume goes on with, beside the model
_PROGRESS = "progress"
_SIZES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8},
    "medium": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}


def add_train(commands: argparse._SubParsersAction) -> None:
    """The ``train`` command's arguments."""
    parser = commands.add_parser("train", help="train a model on text files or token arrays")
    parser.add_argument(
        "data", nargs="+", type=Path, help="text files, or .npy arrays of token ids"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder for the model")
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON with LM2Config's options")
    parser.add_argument("--size", choices=tuple(_SIZES), default="small", help="if no --config")
    parser.add_argument("--formulation", choices=("paper", "release"), help="of the memory")
    parser.add_argument("--flow", choices=("depth", "time"), help="of the memory")
    parser.add_argument("--slots", type=int, help="memory slots, the length of a segment")
    parser.add_argument("--no-memory", action="store_true", help="the same model without memory")
    parser.add_argument("--vocab-size", type=int, help="of token arrays; else from the data")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16, help="rows a step, all processes together")
    parser.add_argument("--length", type=int, help="tokens of a row; four segments unless given")
    parser.add_argument("--bptt-segments", type=int, help="how far gradients reach back")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, help="steps; a twentieth unless given")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16 is autocast; the weights stay float32",
    )
    parser.add_argument("--validation", type=float, default=0.05, help="share of each file's end")
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="for --resume")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="under torchrun")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run_train)


def run_train(options: argparse.Namespace) -> int:
    """Train, and write the model into ``--out``."""
    with distributed.process_group() as place:
        # a function of its own: nothing of a wrapped model may outlive the group
        _train(options, *place)
    return 0


def _train(options: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
    _check(options)
    data = Corpus.open(options.data, options.vocab_size)
    config = _configuration(options, data)
    length = _or(options.length, 4 * config.memory_slots)
    seen, kept = data.split(options.validation, length)
    if options.batch < 1 or options.batch % world:
        raise ValueError(
            f"--batch must be a multiple of the number of processes, {world}, got {options.batch}"
        )
    torch.manual_seed(options.seed)
    model = LM2ForCausalLM(config).to(device)
    wrapped = distributed.wrap(model, options.parallel, device)
    optimizer = torch.optim.AdamW(
        training.optimizer_groups(wrapped, options.weight_decay), lr=options.lr
    )
    first = 0
    if options.resume:
        first = distributed.load_progress(options.out / _PROGRESS, wrapped, optimizer)
    if rank == 0:
        left_out = len(data.files) - len(seen.files)
        if left_out:
            print(f"{left_out} files are too short for windows of {length} tokens: left out")
        if not options.resume:
            _remove_run(options.out)
        # a run that is cut short can be gone on with by this
        save_config(options.out, dataclasses.asdict(config))
        save_tokenizer(options.out, data.tokenizer)
        count = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{count:,} parameters, {sum(map(len, seen.files)):,} tokens, {world} processes of "
            f"{device.type}, steps {first + 1} to {options.steps}",
            flush=True,
        )
    bar = StepBar("train", first) if rank == 0 else None

    def after_step(done: int, total: int, loss: float) -> None:
        if options.save_every and done % options.save_every == 0 and done < total:
            distributed.save_progress(options.out / _PROGRESS, wrapped, optimizer, done)
        if bar is not None:
            bar(done, total, loss)

    autocast = None if options.dtype == "float32" else torch.bfloat16
    try:
        training.train(
            wrapped,
            seen.batches(options.batch, length, options.seed, first=first, rank=rank, world=world),
            steps=options.steps,
            first=first,
            optimizer=optimizer,
            lr=options.lr,
            warmup=_or(options.warmup, max(options.steps // 20, 1)),
            clip=options.clip,
            autocast=autocast,
            bptt_segments=options.bptt_segments,
            progress=after_step,
        )
    finally:
        if bar is not None:
            bar.close()
    if options.save_every:
        distributed.save_progress(options.out / _PROGRESS, wrapped, optimizer, options.steps)
    windows = kept.batches(options.batch, length, 0, rank=rank, world=world)
    loss = training.mean_loss(wrapped, itertools.islice(windows, 8), autocast=autocast)
    loss = distributed.mean(loss, device)
    weights = distributed.full_state_dict(wrapped)
    if rank == 0:
        model.save(options.out, weights)
        print(
            f"validation loss {loss:.4f} ({loss / math.log(2):.3f} bits a token, perplexity "
            f"{math.exp(loss):.2f}); the model is in {options.out}"
        )


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for options that nothing later would refuse."""
    for name, low in (("length", 2), ("save_every", 1), ("warmup", 0), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    if not options.weight_decay >= 0.0:
        raise ValueError(f"--weight-decay must be at least 0, got {options.weight_decay}")
    model_options = ("config", "formulation", "flow", "slots", "no_memory")
    given = [name for name in model_options if getattr(options, name) not in (None, False)]
    if options.resume and given:
        raise ValueError(f"--resume goes on with the model as it is: --{given[0]} does not fit")


def _remove_run(folder: Path) -> None:
    """Remove an earlier run's weights, which would lie beside this one's configuration."""
    shutil.rmtree(folder / _PROGRESS, ignore_errors=True)
    (folder / WEIGHTS).unlink(missing_ok=True)


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _configuration(options: argparse.Namespace, data: Corpus) -> LM2Config:
    vocab_size, is_text = data.vocab_size, isinstance(data.tokenizer, Bytes)
    if options.resume:
        return LM2Config.from_dict(load_config(options.out))
    if options.config is not None:
        try:
            values = json.loads(options.config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{options.config} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{options.config} must hold an object of LM2Config's options")
    else:
        values = {**_SIZES[options.size], "memory_slots": 128, "memory_heads": 4}
        values["intermediate_size"] = 4 * values["hidden_size"]
        values["tie_word_embeddings"] = True
    values.setdefault("vocab_size", vocab_size)
    for name, value in (
        ("formulation", options.formulation),
        ("flow", options.flow),
        ("memory_slots", options.slots),
        ("memory_layers", () if options.no_memory else None),
    ):
        if value is not None:
            values[name] = value
    config = LM2Config.from_dict(values)
    if config.vocab_size < vocab_size:
        raise ValueError(f"the data has {vocab_size} tokens, the configuration {config.vocab_size}")
    if is_text and config.vocab_size != vocab_size:
        raise ValueError(f"text has {vocab_size} tokens, the configuration {config.vocab_size}")
    return config
