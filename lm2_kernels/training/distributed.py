"""One process or several: wrapping a model for data-parallel training, and its checkpoints.

Under ``torchrun`` every process calls these in the same order. With ``ddp`` each holds the whole
model (DistributedDataParallel), with ``fsdp`` a share of every parameter (FSDP2).
"""

import contextlib
import gc
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lm2_kernels import machine
from lm2_kernels.model.decoder import LM2ForCausalLM
from lm2_kernels.training.loop import Batch

__all__ = [
    "by_first",
    "full_state_dict",
    "is_step",
    "last_progress",
    "load_progress",
    "mean",
    "process_group",
    "save_progress",
    "weighted",
    "wrap",
]


@contextlib.contextmanager
def process_group() -> Iterator[tuple[int, int, torch.device]]:
    """Join the processes that ``torchrun`` started, if it did: (rank, world size, device)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if machine.best_device() != "cpu":
        device = torch.device(machine.best_device(), local)
        torch.accelerator.set_device_index(local)
    if "RANK" not in os.environ:
        yield 0, 1, device
        return
    dist.init_process_group(dist.get_default_backend_for_device(device))
    try:
        yield dist.get_rank(), world, device
    finally:
        # A group lives for as long as a model that was wrapped with it, which only a collection
        # frees; its threads, alive when Python ends, now and then abort the process.
        gc.collect()
        dist.destroy_process_group()


def wrap(model: LM2ForCausalLM, kind: str, device: torch.device) -> nn.Module:
    """The model for training by all processes.

    Args:
        model: equal in all processes, on ``device``.
        kind: "ddp" or "fsdp".
        device: of this process.
    """
    if not dist.is_initialized():
        return model
    if kind == "ddp":
        ids = None if device.type == "cpu" else [device.index]
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - slow to import
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def mean(value: float, device: torch.device) -> float:
    """The mean of every process's value."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def weighted(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches with the weight of a process's loss: its labels n of the N of all P processes.

    A loss is a mean over the labels of a process, and gradients are means over processes. With
    ``weight = P n / N`` they are those of the mean over all labels, as one process has them.

    Args:
        batches: with "labels" (B, L), of which -100 are none, nor is the first of a row.
        device: of this process.
    """
    for batch in batches:
        if not dist.is_initialized():
            yield batch
            continue
        own = (batch["labels"][:, 1:] != -100).sum().to(device)
        total = own.clone()
        dist.all_reduce(total)
        yield {**batch, "weight": dist.get_world_size() * own.double() / total}


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole model's state dict on the CPU, in process 0; in the others perhaps empty."""
    from torch.distributed.checkpoint.state_dict import (  # noqa: PLC0415 - slow to import
        StateDictOptions,
        get_model_state_dict,
    )

    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def by_first(function: Callable[[], object]) -> object:
    """What a function gives in process 0, where alone it is called; its error is that of all."""
    if not dist.is_initialized():
        return function()
    outcome: list[object] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [(function(), None)]
        except (OSError, TypeError, ValueError) as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome)
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def save_progress(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Write what a run needs to be gone on with, with torch's own distributed checkpoints.

    The one before is removed when this one is whole.

    Raises:
        OSError: it cannot be written; the one before is there still.
        KeyboardInterrupt: as raised meanwhile; likewise.
    """
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415 - slow to import

    place = Path(folder) / f"step-{step}"
    part = place.with_name(f"{place.name}.part")
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if is_first:
        shutil.rmtree(part, ignore_errors=True)
    state = _progress(model, optimizer, step)
    try:
        with _alone_is_fine() as alone:
            dcp.save(state, checkpoint_id=str(part), no_dist=alone)
        if not is_first:
            return
        shutil.rmtree(place, ignore_errors=True)
        part.rename(place)
    except (dcp.api.CheckpointException, OSError, RuntimeError) as error:
        if is_first:
            shutil.rmtree(part, ignore_errors=True)
        for failure, _ in getattr(error, "failures", {}).values():
            if isinstance(failure, KeyboardInterrupt):
                raise failure from None
        raise OSError(f"cannot write {place}: {_reason(error)}") from error
    for old in Path(folder).glob("step-*"):
        if old != place and is_step(old):
            shutil.rmtree(old)


def is_step(path: Path) -> bool:
    """Whether :func:`save_progress` gave a folder its name."""
    is_named = re.fullmatch(r"step-\d+(\.part)?", path.name) is not None
    return is_named and path.is_dir() and not path.is_symlink()


def last_progress(folder: str | Path) -> tuple[int, Path] | None:
    """The steps done, and the place, of what :func:`save_progress` wrote last; None if nothing."""
    # the metadata is written last, and the folder gets its name then
    found = [path.parent for path in Path(folder).glob("step-*/.metadata")]
    steps = [(int(p.name[5:]), p) for p in found if p.name[5:].isdecimal()]
    return max(steps, default=None)


def load_progress(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read what :func:`save_progress` wrote, with any number of processes. Returns the steps done.

    Raises:
        FileNotFoundError: nothing was saved there.
        ValueError: it is damaged, or of another model.
    """
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415 - as above
    from torch.distributed.checkpoint.state_dict import set_state_dict  # noqa: PLC0415

    last = last_progress(folder)
    if last is None:
        raise FileNotFoundError(f"{folder} holds no saved run; train with --save-every")
    state = _progress(model, optimizer, 0)
    try:
        with _alone_is_fine() as alone:
            dcp.load(state, checkpoint_id=str(last[1]), no_dist=alone)
    except (dcp.api.CheckpointException, OSError, RuntimeError) as error:
        raise ValueError(f"{last[1]} is damaged or of another model: {_reason(error)}") from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    return int(state["step"])


def _reason(error: BaseException) -> str:
    """The first line of what lies under an error of torch's checkpoints."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0]


@contextlib.contextmanager
def _alone_is_fine() -> Iterator[bool]:
    """Whether there is one process only, about which torch's checkpoints need not warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield not dist.is_initialized()


def _progress(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, object]:
    from torch.distributed.checkpoint.state_dict import get_state_dict  # noqa: PLC0415 - as above

    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "step": torch.tensor(step)}
