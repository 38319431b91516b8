"""A training run: its options, its model's configuration and its data, as ``run.json`` has them."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

from lm2_kernels.checks import SEEDS
from lm2_kernels.model.config import LM2Config
from lm2_kernels.training.data import Ids
from lm2_kernels.training.distributed import last_progress
from lm2_kernels.training.folder import PROGRESS, check_new, locked, read_run, write_run
from lm2_kernels.training.sources import Data

# What a run remembers, and what it is unless given. The parser of the command knows no defaults:
# a run that goes on has to see what was given.
DEFAULTS = {
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
    "validation": None,
    "save_every": None,
    "telemetry": None,
    "parallel": "ddp",
    "seed": 0,
    "tasks": None,
    "lengths": None,
    "segments": None,
    "curriculum": None,
    "loss": None,
    "layout": None,
    "tokenizer": None,
    "babi": None,
    "background": None,
}
# what a run that goes on may be told anew
_CHANGEABLE = ("steps", "save_every", "telemetry", "parallel")
# where its data are now, whose digests say whether they are the same
_MOVABLE = ("babi", "background")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as ``run.json`` has it."""

    options: dict  # by the names of DEFAULTS, with what is None there in numbers, if it is used
    config: LM2Config
    data: list[dict]  # of each file or task: its path or name, and digest
    tokenizer: str
    is_finished: bool = False

    @classmethod
    def on(cls, data: Data, options: dict, config: LM2Config) -> "Run":
        """A run on these data, which are read for their digests."""
        return cls(options, config, data.entries(), data.tokenizer.kind)

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """What :meth:`write` wrote.

        Raises:
            OSError, ValueError: the folder holds no run.
        """
        content = read_run(folder)
        try:
            stored = {**DEFAULTS, **content["options"]}
            config = LM2Config.from_saved(content["config"])
            data = [{"path": str(d["path"]), "digest": str(d["digest"])} for d in content["data"]]
            return cls(stored, config, data, content["tokenizer"], content["is_finished"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the run.json of {folder} is damaged: {error}") from None

    def write(self, folder: Path) -> None:
        """Write ``run.json``."""
        write_run(folder, {**dataclasses.asdict(self), "config": self.config.to_dict()})

    @property
    def paths(self) -> list[Path]:
        """Where the data were."""
        return [Path(entry["path"]) for entry in self.data]

    def check_data(self, other: "Run") -> None:
        """Raise ValueError unless another run is on the same data, wherever they are."""
        was, now = _kind(self.tokenizer), _kind(other.tokenizer)
        if was != now:
            raise ValueError(f"the run was trained on {was}, got {now}")
        if len(self.data) != len(other.data):
            kind = "files" if self.options["tasks"] is None else "tasks and texts"
            raise ValueError(
                f"the run was trained on {len(self.data)} {kind}, got {len(other.data)}"
            )
        digests = [[entry["digest"] for entry in run.data] for run in (self, other)]
        is_reordered = sorted(digests[0]) == sorted(digests[1])
        for old, new in zip(self.data, other.data, strict=True):
            if old["digest"] != new["digest"]:
                raise ValueError(
                    f"the data {'are in another order' if is_reordered else 'have changed'}: "
                    f"{new['path']} is not what the run was trained on ({old['path']})"
                )

    def changes(self, other: "Run") -> list[str]:
        """A line for each option that is another in the run as it goes on."""
        return [
            f"{flag(name)} is {other.options[name]}, was {self.options[name]}"
            for name in _CHANGEABLE
            if other.options[name] != self.options[name]
        ]


def _kind(tokenizer: str) -> str:
    return "token ids" if tokenizer == Ids.kind else "text"


@contextlib.contextmanager
def examined(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[tuple[bool, Run | None]]:
    """Look at a run's folder and hold it alone meanwhile; nothing is touched.

    Yields whether it is there, and so held, and with ``resume`` the run to go on with; else None,
    and a new run may write there.

    Raises:
        OSError, ValueError: as :func:`~lm2_kernels.training.folder.locked` and
            :func:`~lm2_kernels.training.folder.check_new`, or there is no run to go on with.
    """
    is_there = folder.is_dir()
    # before it is read, so that no other run changes what was read
    with locked(folder) if is_there else contextlib.nullcontext():
        if not resume:
            check_new(folder, overwrite)
        stored = Run.read(folder) if resume else None
        if stored is not None and stored.is_finished and last_progress(folder / PROGRESS) is None:
            raise ValueError(
                f"{folder} holds no saved run: it is finished, and without --save-every nothing "
                f"was kept to go on from"
            )
        yield is_there, stored


def chosen_options(given: dict, folder: Path, stored: Run | None) -> dict:
    """A run's options by their names: those given, then those of the run that goes on, or defaults.

    Raises:
        ValueError: an option cannot be what it is, or what it is in a run that goes on.
    """
    if stored is None:
        chosen = DEFAULTS | given
        _check(chosen)
        return chosen
    movable = [name for name in _MOVABLE if stored.options[name] is not None]
    for name, value in given.items():
        if value != stored.options[name] and name not in (*_CHANGEABLE, *movable):
            raise ValueError(
                f"{flag(name)} of this run is {stored.options[name]}, got {value}: --resume takes "
                f"the run's own options ({', '.join(map(flag, _CHANGEABLE))} may be others)"
            )
    chosen = stored.options | given
    _check(chosen)
    last = last_progress(folder / PROGRESS)
    if last is not None and last[0] > chosen["steps"]:
        raise ValueError(f"--steps {chosen['steps']}: the run has done {last[0]} steps already")
    return chosen


def _check(chosen: dict) -> None:
    """Raise ValueError for options that nothing would refuse before the folder is touched."""
    lows = {"vocab_size": 1, "steps": 1, "batch": 1, "length": 2, "bptt_segments": 1}
    lows |= {"save_every": 1, "telemetry": 1, "warmup": 0, "lr": 0.0, "weight_decay": 0.0}
    for name, low in lows.items():
        value = chosen[name]
        if value is not None and not low <= value < math.inf:
            finite = " and finite" if isinstance(low, float) else ""
            raise ValueError(f"{flag(name)} must be at least {low}{finite}, got {value}")
    if chosen["seed"] not in SEEDS:
        raise ValueError(f"--seed must be from 0 to 2**63 - 1, got {chosen['seed']}")
    if not 0.0 < chosen["clip"] < math.inf:
        raise ValueError(f"--clip must be above 0 and finite, got {chosen['clip']}")


def flag(name: str) -> str:
    """An option's name as the command line has it."""
    return f"--{name.replace('_', '-')}"
