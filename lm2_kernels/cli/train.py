"""``python -m lm2_kernels train``: a model from text files or token arrays."""

import argparse
import contextlib
import dataclasses
import itertools
import math
import signal
from pathlib import Path

import torch

from lm2_kernels import training
from lm2_kernels.checks import SEEDS
from lm2_kernels.cli.signals import Interrupted, Stop
from lm2_kernels.model.config import LM2Config
from lm2_kernels.model.decoder import LM2ForCausalLM, check_room
from lm2_kernels.state import files
from lm2_kernels.terminal import StepBar
from lm2_kernels.training import distributed, folder
from lm2_kernels.training.data import RAW_DTYPES, Bytes, Corpus
from lm2_kernels.training.loop import seeded

_SIZES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8},
    "medium": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}
# what a run remembers, and what it is unless given. The parser knows no defaults: --resume has to
# see what was given.
_DEFAULTS = {
    "data_dtype": None,
    "vocab_size": None,
    "steps": 1000,
    "batch": 16,
    "length": None,
    "bptt_segments": None,
    "lr": 1e-3,
    "warmup": None,
    "weight_decay": 0.1,
    "clip": 1.0,
    "dtype": "float32",
    "validation": 0.05,
    "save_every": None,
    "parallel": "ddp",
    "seed": 0,
}
# what a run that goes on may be told anew
_CHANGEABLE = ("steps", "save_every", "parallel")
# what ends a run in one line; their kinds take other arguments than a text
_ERRORS = (OSError, ArithmeticError, MemoryError, ValueError)
_OF_THE_MODEL = ("config", "size", "formulation", "flow", "slots", "no_memory")


def add_train(commands: argparse._SubParsersAction) -> None:
    """The ``train`` command's arguments."""
    parser = commands.add_parser("train", help="train a model on text files or token arrays")
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
    parser.add_argument("--slots", type=int, help="memory slots, the length of a segment")
    parser.add_argument("--no-memory", action="store_true", help="the same model without memory")
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
        "--resume",
        action="store_true",
        help="go on with the run in --out, by its own options; others may be --steps, --save-every "
        "and --parallel",
    )
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), help="under torchrun (ddp)")
    parser.add_argument("--seed", type=int, help="(0)")
    parser.set_defaults(run=run_train)


def _precision(text: str) -> str:
    if text in RAW_DTYPES:
        raise argparse.ArgumentTypeError(f"{text} is no precision; for data it is --data-dtype")
    if text not in ("float32", "bfloat16"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither float32 nor bfloat16")
    return text


def run_train(options: argparse.Namespace) -> int:
    """Train, and write the model into ``--out``."""
    with distributed.process_group() as place, contextlib.ExitStack() as held:
        # a function of its own: nothing of a wrapped model may outlive the group
        _train(options, held, *place)
    return 0


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run as ``run.json`` has it."""

    options: dict  # by the names of _DEFAULTS, and warmup and length in numbers
    config: LM2Config
    data: list[dict]  # of each file: its path and digest
    tokenizer: str
    is_finished: bool = False

    def write(self, out: Path) -> None:
        folder.write_run(out, {**dataclasses.asdict(self), "config": self.config.to_dict()})

    @classmethod
    def read(cls, out: Path) -> "_Run":
        content = folder.read_run(out)
        try:
            stored = {**_DEFAULTS, **content["options"]}
            config = LM2Config.from_dict(content["config"])
            data = [{"path": str(d["path"]), "digest": str(d["digest"])} for d in content["data"]]
            return cls(stored, config, data, content["tokenizer"], content["is_finished"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the run.json of {out} is damaged: {error}") from None


def _train(
    options: argparse.Namespace,
    held: contextlib.ExitStack,
    rank: int,
    world: int,
    device: torch.device,
) -> None:
    # everything is looked at before anything is touched
    is_locked, stored = distributed.by_first(lambda: _stored(options, held))
    chosen = _chosen(options, stored)
    data = Corpus.open(_paths(options, stored), chosen["vocab_size"], chosen["data_dtype"])
    config = _configuration(options, data) if stored is None else stored.config
    chosen["length"] = _or(chosen["length"], 4 * config.memory_slots)
    chosen["warmup"] = _or(chosen["warmup"], max(chosen["steps"] // 20, 1))
    seen, kept = data.split(chosen["validation"], chosen["length"])
    if chosen["batch"] % world:
        raise ValueError(
            f"--batch must be a multiple of the number of processes, {world}, got {chosen['batch']}"
        )
    check_room(config)
    run = distributed.by_first(lambda: _described(options, stored, chosen, config, data))
    torch.manual_seed(chosen["seed"])
    model = LM2ForCausalLM(config).to(device)
    wrapped = distributed.wrap(model, chosen["parallel"], device)
    optimizer = torch.optim.AdamW(
        training.optimizer_groups(wrapped, chosen["weight_decay"]), lr=chosen["lr"]
    )
    # before the progress of an earlier run goes: a batch may be too large for the memory
    next(seen.batches(chosen["batch"], chosen["length"], chosen["seed"], rank=rank, world=world))
    progress, first = options.out / folder.PROGRESS, 0
    has_progress = distributed.by_first(lambda: _claim(options, held, is_locked))
    if has_progress:
        first = distributed.load_progress(progress, wrapped, optimizer)
    if rank == 0:
        run.write(options.out)
        _introduce(model, data, seen, chosen, f"{world} processes of {device.type}", first)
    bar = StepBar("train", first) if rank == 0 else None
    done, is_saved = first, False

    def save_progress() -> None:
        last = distributed.last_progress(progress)
        if last is None or last[0] != done:
            distributed.save_progress(progress, wrapped, optimizer, done)

    def after_step(step: int, total: int, loss: float) -> bool:
        nonlocal done
        done = step
        if bar is not None:
            bar(step, total, loss)
        if chosen["save_every"] and step % chosen["save_every"] == 0 and step < total:
            save_progress()
        return stop.number is not None

    autocast = None if chosen["dtype"] == "float32" else torch.bfloat16
    batches = seen.batches(
        chosen["batch"], chosen["length"], chosen["seed"], first=first, rank=rank, world=world
    )
    try:
        # several processes would not all stop after the same step
        with Stop(is_on=world == 1) as stop:
            training.train(
                wrapped,
                seeded(batches, chosen["seed"], first, rank),
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
                folder.save_model(options.out, config, data.tokenizer, weights)
                is_saved = True
            if chosen["save_every"]:
                save_progress()
            if rank == 0:
                dataclasses.replace(run, is_finished=True).write(options.out)
            if rank == 0 and not chosen["save_every"]:
                folder.remove_progress(options.out)
        windows = kept.batches(chosen["batch"], chosen["length"], 0, rank=rank, world=world)
        loss = training.mean_loss(wrapped, itertools.islice(windows, 8), autocast=autocast)
        loss = distributed.mean(loss, device)
    except _ERRORS as error:
        kind = next(kind for kind in _ERRORS if isinstance(error, kind))
        text = str(error) or type(error).__name__
        raise kind(f"{text}; {_where(options.out, is_saved, chosen)}") from error
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"interrupted after step {done} of {chosen['steps']}; "
            f"{_where(options.out, is_saved, chosen)}",
            getattr(error, "number", signal.SIGINT),
        ) from None
    finally:
        if bar is not None:
            bar.close()
    if rank == 0:
        # above, float64 overflows
        perplexity = math.exp(loss) if loss < 700.0 else math.inf
        print(
            f"validation loss {loss:.4f} ({loss / math.log(2):.3f} bits a token, perplexity "
            f"{perplexity:.2f}); the model is in {options.out}"
        )


def _stored(options: argparse.Namespace, held: contextlib.ExitStack) -> tuple[bool, _Run | None]:
    """Whether the folder is there, and so held, and the run to go on with.

    None is a new one, which may write into its folder.
    """
    is_there = options.out.is_dir()
    if is_there:
        # before it is read, so that no other run changes what was read
        held.enter_context(folder.locked(options.out))
    if not options.resume:
        folder.check_new(options.out, options.overwrite)
        return is_there, None
    if options.overwrite:
        raise ValueError("--overwrite begins anew, --resume does not: give one of them")
    for name in _OF_THE_MODEL:
        if getattr(options, name) not in (None, False):
            raise ValueError(
                f"--resume goes on with the model as it is: {_flag(name)} does not fit"
            )
    run = _Run.read(options.out)
    if run.is_finished and distributed.last_progress(options.out / folder.PROGRESS) is None:
        raise ValueError(
            f"{options.out} holds no saved run: it is finished, and without --save-every nothing "
            f"was kept to go on from"
        )
    return is_there, run


def _chosen(options: argparse.Namespace, stored: _Run | None) -> dict:
    """The run's options by their names: those given, then the run's own, then the defaults."""
    given = {n: getattr(options, n) for n in _DEFAULTS if getattr(options, n) is not None}
    if stored is None:
        _check(_DEFAULTS | given)
        return _DEFAULTS | given
    for name, value in given.items():
        if value != stored.options[name] and name not in _CHANGEABLE:
            raise ValueError(
                f"{_flag(name)} of this run is {stored.options[name]}, got {value}: --resume takes "
                f"the run's own options ({', '.join(map(_flag, _CHANGEABLE))} may be others)"
            )
    chosen = stored.options | given
    _check(chosen)
    last = distributed.last_progress(options.out / folder.PROGRESS)
    if last is not None and last[0] > chosen["steps"]:
        raise ValueError(f"--steps {chosen['steps']}: the run has done {last[0]} steps already")
    return chosen


def _check(chosen: dict) -> None:
    """Raise ValueError for options that nothing would refuse before the folder is touched."""
    lows = {"vocab_size": 1, "steps": 1, "batch": 1, "length": 2, "bptt_segments": 1}
    lows |= {"save_every": 1, "warmup": 0, "lr": 0.0, "weight_decay": 0.0}
    for name, low in lows.items():
        value = chosen[name]
        if value is not None and not low <= value < math.inf:
            finite = " and finite" if isinstance(low, float) else ""
            raise ValueError(f"{_flag(name)} must be at least {low}{finite}, got {value}")
    if chosen["seed"] not in SEEDS:
        raise ValueError(f"--seed must be from 0 to 2**63 - 1, got {chosen['seed']}")
    if not 0.0 < chosen["clip"] < math.inf:
        raise ValueError(f"--clip must be above 0 and finite, got {chosen['clip']}")


def _paths(options: argparse.Namespace, stored: _Run | None) -> list[Path]:
    if options.data:
        return options.data
    if stored is None:
        raise ValueError("give files to train on")
    return [Path(entry["path"]) for entry in stored.data]


def _described(
    options: argparse.Namespace,
    stored: _Run | None,
    chosen: dict,
    config: LM2Config,
    data: Corpus,
) -> _Run:
    """The run as it will be; of one that goes on the data are compared with what it had."""
    paths = [str(path.resolve()) for path in _paths(options, stored)]
    files_now = [
        {"path": path, "digest": digest} for path, digest in zip(paths, data.digests(), strict=True)
    ]
    if stored is not None:
        kinds = [_kind(tokenizer) for tokenizer in (stored.tokenizer, data.tokenizer.kind)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"the run was trained on {kinds[0]}, got {kinds[1]}")
        was, now = ([entry["digest"] for entry in some] for some in (stored.data, files_now))
        if len(was) != len(now):
            raise ValueError(f"the run was trained on {len(was)} files, got {len(now)}")
        if was != now:
            number = next(n for n, (a, b) in enumerate(zip(was, now, strict=True)) if a != b)
            what = "are in another order" if sorted(was) == sorted(now) else "have changed"
            raise ValueError(
                f"the data {what}: {paths[number]} is not what the run was trained on "
                f"({stored.data[number]['path']})"
            )
        for name in _CHANGEABLE:
            if chosen[name] != stored.options[name]:
                print(f"{_flag(name)} is {chosen[name]}, was {stored.options[name]}")
    return _Run(chosen, config, files_now, data.tokenizer.kind)


def _kind(tokenizer: str) -> str:
    return "text" if tokenizer == Bytes.kind else "token ids"


def _claim(options: argparse.Namespace, held: contextlib.ExitStack, is_locked: bool) -> bool:
    """Make the folder and hold it. Returns whether there is progress to go on from."""
    held.enter_context(folder.claimed(options.out, is_locked))
    if not options.resume:
        folder.check_new(options.out, options.overwrite)
        folder.remove_progress(options.out)
    return distributed.last_progress(options.out / folder.PROGRESS) is not None


def _introduce(
    model: LM2ForCausalLM, data: Corpus, seen: Corpus, chosen: dict, where: str, first: int
) -> None:
    left_out = len(data.files) - len(seen.files)
    if left_out:
        print(f"{left_out} files are too short for windows of {chosen['length']} tokens: left out")
    count, last = sum(parameter.numel() for parameter in model.parameters()), chosen["steps"]
    print(
        f"{count:,} parameters, {sum(map(len, seen.files)):,} tokens, {where}, "
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


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _configuration(options: argparse.Namespace, data: Corpus) -> LM2Config:
    vocab_size, is_text = data.vocab_size, isinstance(data.tokenizer, Bytes)
    if options.config is not None:
        try:
            values = files.read_json(options.config)
            # which a saved model has beside the options
            values.pop("format", None)
        except ValueError as error:
            raise ValueError(f"--config: {error}") from None
    else:
        values = {**_SIZES[options.size or "small"], "memory_slots": 128, "memory_heads": 4}
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
