"""One process or several: wrapping a model for data-parallel training, and its checkpoints.

Under ``torchrun`` every process calls these in the same order. With ``ddp`` each holds the whole
model (DistributedDataParallel), with ``fsdp`` a share of every parameter (FSDP2).
"""

import contextlib
import gc
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lm2_kernels import machine
from lm2_kernels.model.decoder import LM2ForCausalLM

__all__ = [
    "full_state_dict",
    "load_progress",
    "mean",
    "process_group",
    "save_progress",
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


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole model's state dict on the CPU, in process 0; in the others perhaps empty."""
    from torch.distributed.checkpoint.state_dict import (  # noqa: PLC0415 - slow to import
        StateDictOptions,
        get_model_state_dict,
    )

    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def save_progress(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Write what a run needs to be gone on with, with torch's own distributed checkpoints.

    The one before is removed when this one is whole.
    """
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415 - slow to import

    place = Path(folder) / f"step-{step}"
    state = _progress(model, optimizer, step)
    with _alone_is_fine() as alone:
        dcp.save(state, checkpoint_id=str(place), no_dist=alone)
    if not dist.is_initialized() or dist.get_rank() == 0:
        for old in Path(folder).glob("step-*"):
            if old != place:
                shutil.rmtree(old)


def load_progress(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read what :func:`save_progress` wrote, with any number of processes. Returns the steps done.

    Raises:
        FileNotFoundError: nothing was saved there.
    """
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415 - as above
    from torch.distributed.checkpoint.state_dict import set_state_dict  # noqa: PLC0415

    # the metadata is written last
    whole = [path.parent for path in Path(folder).glob("step-*/.metadata")]
    if not whole:
        raise FileNotFoundError(f"{folder} holds no saved run; train with --save-every")
    place = max(whole, key=lambda path: int(path.name.removeprefix("step-")))
    state = _progress(model, optimizer, 0)
    with _alone_is_fine() as alone:
        dcp.load(state, checkpoint_id=str(place), no_dist=alone)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    return int(state["step"])


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
