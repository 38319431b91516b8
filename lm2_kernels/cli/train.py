"""``python -m lm2_kernels train``: a model from text files or token arrays."""

import argparse
import contextlib
import dataclasses
import functools
import re
import signal
from pathlib import Path

import torch

from lm2_kernels import training
from lm2_kernels.cli.signals import Interrupted, Stop
from lm2_kernels.cli.train_tasks import OF_TASKS, add_tasks
from lm2_kernels.evaluation.lessons import Lessons
from lm2_kernels.model.config import LM2Config
from lm2_kernels.model.decoder import LM2ForCausalLM, check_room
from lm2_kernels.state import files
from lm2_kernels.terminal import StepBar
from lm2_kernels.training import distributed, folder
from lm2_kernels.training.data import RAW_DTYPES, Corpus, Ids
from lm2_kernels.training.loop import seeded
from lm2_kernels.training.run import DEFAULTS, Run, chosen_options, examined, flag
from lm2_kernels.training.sources import Batches, Data, Files
from lm2_kernels.training.telemetry import Telemetry

_SIZES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8},
    "medium": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}
# what ends a run, and is told where it can be gone on with; by these kinds, as their own may take
# other arguments than a text
_ERRORS = (OSError, ArithmeticError, MemoryError, ValueError, RuntimeError)
# options of the memory by the names that LM2Config has for them
_OF_THE_MEMORY = {
    "formulation": "formulation",
    "flow": "flow",
    "slots": "memory_slots",
    "segment_length": "segment_length",
    "write": "write",
    "memory_causal": "memory_causal",
    "candidate": "candidate",
}
# options of files, which tasks do not have
_OF_FILES = ("data_dtype", "vocab_size", "length", "validation")
# of --telemetry, unless given
TELEMETRY_STEPS = 100
# which a run that goes on has already
_OF_THE_MODEL = ("config", "size", *_OF_THE_MEMORY, "no_memory")


def add_train(commands: argparse._SubParsersAction) -> None:
    """The ``train`` command's arguments."""
    parser = commands.add_parser(
        "train", help="train a model on text files, token arrays, or tasks for its memory"
    )
    parser.add_argument(
        "data",
        nargs="*",
        type=Path,
        help="text files, .npy arrays of token ids, or raw ids (--data-dtype); with --resume the "
        "run's own unless given",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder for the model")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what train wrote into --out before"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON with LM2Config's options")
    parser.add_argument("--size", choices=tuple(_SIZES), help="if no --config (small)")
    parser.add_argument("--formulation", choices=("paper", "release"), help="of the memory")
    parser.add_argument("--flow", choices=("depth", "time"), help="of the memory")
    parser.add_argument("--slots", type=int, help="memory slots")
    parser.add_argument(
        "--segment-length", type=int, help="tokens of a segment; as many as slots unless given"
    )
    parser.add_argument(
        "--write",
        choices=("position", "chunk"),
        help="a token or several neighbours to a slot; chunk needs --flow time (position)",
    )
    parser.add_argument(
        "--memory-causal",
        action=argparse.BooleanOptionalAction,
        help="whether a token sees the slots up to its own alone; yes for position, no for chunk",
    )
    parser.add_argument(
        "--candidate",
        choices=("read", "token"),
        help="what is written; as --config has it, else token",
    )
    parser.add_argument(
        "--no-memory", action="store_true", default=None, help="the same model without memory"
    )
    parser.add_argument(
        "--data-dtype",
        choices=RAW_DTYPES,
        help="of files that are token ids and nothing else, as nanoGPT's .bin (uint16)",
    )
    parser.add_argument("--vocab-size", type=int, help="of token ids; else from the data")
    parser.add_argument("--steps", type=int, help="(1000)")
    parser.add_argument("--batch", type=int, help="rows a step, all processes together (16)")
    parser.add_argument("--length", type=int, help="tokens of a row; four segments unless given")
    parser.add_argument("--bptt-segments", type=int, help="how far gradients reach back")
    parser.add_argument("--lr", type=float, help="(0.001)")
    parser.add_argument("--warmup", type=int, help="steps; a twentieth unless given")
    parser.add_argument("--weight-decay", type=float, help="(0.1)")
    parser.add_argument("--clip", type=float, help="(1)")
    parser.add_argument(
        "--dtype",
        type=_precision,
        metavar="{float32,bfloat16}",
        help="bfloat16 is autocast; the weights stay float32",
    )
    parser.add_argument("--validation", type=float, help="share of each file's end (0.05)")
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="for --resume")
    parser.add_argument(
        "--telemetry",
        nargs="?",
        type=int,
        const=TELEMETRY_STEPS,
        metavar="STEPS",
        help="write what the memory does, every so many steps, into telemetry.jsonl of the run's "
        f"folder ({TELEMETRY_STEPS})",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, by its own options; others may be --steps, "
        "--save-every, --telemetry and --parallel",
    )
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), help="under torchrun (ddp)")
    parser.add_argument("--seed", type=int, help="(0)")
    add_tasks(parser)
    parser.set_defaults(run=run_train)


def _precision(text: str) -> str:
    if text in RAW_DTYPES:
        raise argparse.ArgumentTypeError(f"{text} is no precision; for data it is --data-dtype")
    if text not in ("float32", "bfloat16"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither float32 nor bfloat16")
    return text


def run_train(options: argparse.Namespace) -> int:
    """Train, and write the model into ``--out``."""
    if options.resume and options.overwrite:
        raise ValueError("--overwrite begins anew, --resume does not: give one of them")
    for name in _OF_THE_MODEL if options.resume else ():
        value = getattr(options, name)
        if value is not None:
            given = flag(f"no_{name}" if value is False else name)
            raise ValueError(f"--resume goes on with the model as it is: {given} does not fit")
    with distributed.process_group() as place, contextlib.ExitStack() as held:
        # a function of its own: nothing of a wrapped model may outlive the group
        _train(options, held, *place)
    return 0


def _planned(
    options: argparse.Namespace, held: contextlib.ExitStack, rank: int, world: int
) -> tuple[Run, Data, Batches, bool]:
    """The run, its data and what it makes of them, and whether its folder is there and so held.

    Everything is looked at, and nothing touched.
    """
    is_locked, stored = distributed.by_first(
        lambda: held.enter_context(
            examined(options.out, resume=options.resume, overwrite=options.overwrite)
        )
    )
    given = {n: getattr(options, n) for n in DEFAULTS if getattr(options, n) is not None}
    chosen = chosen_options(given, options.out, stored)
    data = _data(options.data, chosen, stored)
    config = _configuration(options, data) if stored is None else stored.config
    chosen = data.completed(chosen, config)
    if chosen["telemetry"] and config.num_banks == 0:
        raise ValueError("--telemetry: the model has no memory layers")
    if chosen["warmup"] is None:
        chosen["warmup"] = max(chosen["steps"] // 20, 1)
    batches = data.batches(chosen, config)
    if chosen["batch"] % world:
        raise ValueError(
            f"--batch must be a multiple of the number of processes, {world}, got {chosen['batch']}"
        )
    check_room(config)
    run = distributed.by_first(lambda: Run.on(data, chosen, config))
    if stored is not None:
        stored.check_data(run)
        for change in stored.changes(run) if rank == 0 else ():
            print(change)
    return run, data, batches, is_locked


def _data(paths: list[Path], chosen: dict, stored: Run | None) -> Data:
    """What a run is trained on: files, or the tasks that are named."""
    of_others = OF_TASKS if chosen["tasks"] is None else _OF_FILES
    for name in of_others:
        if chosen[name] is not None:
            kind = "tasks (--tasks)" if chosen["tasks"] is None else "files, not for --tasks"
            raise ValueError(f"{flag(name)} is for {kind}")
    if chosen["tasks"] is not None:
        if paths:
            raise ValueError(f"give files to train on or --tasks, not both (got {paths[0]})")
        return Lessons.open(chosen)
    if not paths and stored is None:
        raise ValueError("give files to train on, or --tasks")
    paths = paths or stored.paths
    return Files(paths, Corpus.open(paths, chosen["vocab_size"], chosen["data_dtype"]))


def _configuration(options: argparse.Namespace, data: Data) -> LM2Config:
    vocab_size, is_text = data.vocab_size, not isinstance(data.tokenizer, Ids)
    make = LM2Config.from_dict
    if options.config is not None:
        try:
            values = files.read_json(options.config)
            # of a saved model
            if values.pop("format", None):
                make = LM2Config.from_saved
        except ValueError as error:
            raise ValueError(f"--config: {error}") from None
    else:
        values = {**_SIZES[options.size or "small"], "memory_slots": 128, "memory_heads": 4}
        values["intermediate_size"] = 4 * values["hidden_size"]
        values["tie_word_embeddings"] = True
    values.setdefault("vocab_size", vocab_size)
    if options.write not in (None, values.get("write", "position")):
        # a saved model has what its own rule takes
        values.pop("memory_causal", None)
    for name, field in _OF_THE_MEMORY.items():
        value = getattr(options, name)
        if value is not None:
            values[field] = value
    if options.no_memory:
        values["memory_layers"] = ()
    try:
        config = make(values)
    except ValueError as error:
        raise ValueError(_in_flags(str(error))) from None
    if config.vocab_size < vocab_size:
        raise ValueError(f"the data has {vocab_size} tokens, the configuration {config.vocab_size}")
    if is_text and config.vocab_size != vocab_size:
        raise ValueError(f"text has {vocab_size} tokens, the configuration {config.vocab_size}")
    return config


def _in_flags(text: str) -> str:
    """What LM2Config says of the memory's options, by their names on the command line."""
    names = {field: name for name, field in _OF_THE_MEMORY.items()}

    def named(found: re.Match) -> str:
        field, value = found.groups()
        name = names[field]
        if value in ("True", "False"):
            return flag(name if value == "True" else f"no_{name}")
        return f"{flag(name)} {value}" if value else flag(name)

    # the others are words as well
    alone = "|".join(field for field in names if "_" in field)
    text = re.sub(rf"\b({'|'.join(names)})='?(\w+)'?", named, text)
    return re.sub(rf"\b({alone})\b()", named, text)


def _train(
    options: argparse.Namespace,
    held: contextlib.ExitStack,
    rank: int,
    world: int,
    device: torch.device,
) -> None:
    out = options.out
    run, data, source, is_locked = _planned(options, held, rank, world)
    chosen = run.options
    torch.manual_seed(chosen["seed"])
    model = LM2ForCausalLM(run.config).to(device)
    wrapped = distributed.wrap(model, chosen["parallel"], device)
    optimizer = torch.optim.AdamW(
        training.optimizer_groups(wrapped, chosen["weight_decay"]), lr=chosen["lr"]
    )
    batches = functools.partial(source.train, rank=rank, world=world)
    # before the progress of an earlier run goes: a batch may be too large for the memory
    next(batches())
    progress, first = out / folder.PROGRESS, 0
    claim = folder.claimed(
        out, is_locked=is_locked, resume=options.resume, overwrite=options.overwrite
    )
    if distributed.by_first(lambda: held.enter_context(claim)):
        first = distributed.load_progress(progress, wrapped, optimizer)
    if rank == 0:
        run.write(out)
        _introduce(model, run, source, f"{world} processes of {device.type}", first)
    bar = StepBar("train", first) if rank == 0 else None
    done, is_saved = first, False
    batches_of_run = seeded(batches(first=first), chosen["seed"], first, rank)
    batches_of_run = distributed.weighted(batches_of_run, device)
    telemetry = None
    if chosen["telemetry"] and rank == 0:
        telemetry = Telemetry(out, model, chosen["telemetry"], first)
        batches_of_run = telemetry.batches(batches_of_run)

    def save_progress() -> None:
        last = distributed.last_progress(progress)
        if last is None or last[0] != done:
            distributed.save_progress(progress, wrapped, optimizer, done)

    def after_step(step: int, total: int, loss: float) -> bool:
        nonlocal done
        done = step
        if bar is not None:
            bar(step, total, loss)
        if telemetry is not None:
            telemetry.after_step(step)
        if chosen["save_every"] and step % chosen["save_every"] == 0 and step < total:
            save_progress()
        return stop.number is not None

    autocast = None if chosen["dtype"] == "float32" else torch.bfloat16
    try:
        # several processes would not all stop after the same step
        with Stop(is_on=world == 1) as stop:
            training.train(
                wrapped,
                batches_of_run,
                steps=chosen["steps"],
                first=first,
                optimizer=optimizer,
                lr=chosen["lr"],
                warmup=chosen["warmup"],
                clip=chosen["clip"],
                autocast=autocast,
                bptt_segments=chosen["bptt_segments"],
                progress=after_step,
            )
            if done < chosen["steps"]:
                save_progress()
                raise Interrupted("", stop.number)
            weights = distributed.full_state_dict(wrapped)
            if rank == 0:
                # first of all: it is what all this was for
                folder.save_model(out, run.config, data.tokenizer, weights)
                is_saved = True
            if chosen["save_every"]:
                save_progress()
            if rank == 0:
                dataclasses.replace(run, is_finished=True).write(out)
            if rank == 0 and not chosen["save_every"]:
                folder.remove_progress(out)
        lines = source.validate(wrapped, rank=rank, world=world, device=device, autocast=autocast)
    except _ERRORS as error:
        kind = next(kind for kind in _ERRORS if isinstance(error, kind))
        text = str(error) or type(error).__name__
        raise kind(f"{text}; {_where(out, is_saved, chosen)}") from error
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"interrupted after step {done} of {chosen['steps']}; {_where(out, is_saved, chosen)}",
            getattr(error, "number", signal.SIGINT),
        ) from None
    finally:
        if bar is not None:
            bar.close()
        if telemetry is not None:
            telemetry.close()
    if rank == 0:
        *before, last = lines
        print(*before, f"{last}; the model is in {out}", sep="\n")


def _introduce(model: LM2ForCausalLM, run: Run, source: Batches, where: str, first: int) -> None:
    last = run.options["steps"]
    for note in source.notes:
        print(note)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{count:,} parameters, {source.summary}, {where}, "
        + (f"steps {first + 1} to {last}" if first < last else f"all {last} steps are done"),
        flush=True,
    )


def _where(out: Path, is_saved: bool, chosen: dict) -> str:
    """What is left of a run that ended early."""
    if is_saved:
        return f"the model is in {out}"
    last = distributed.last_progress(out / folder.PROGRESS)
    if last is not None:
        return f"the progress of step {last[0]} is saved: go on with --resume"
    return "nothing was saved" if chosen["save_every"] else "nothing was saved (--save-every)"
