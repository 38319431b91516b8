"""Two processes that compute together on a CPU, over gloo."""

import multiprocessing
import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

# seconds after which processes that wait for one another are taken to wait for ever
_LIMIT = 120


def _main(rank: int, world: int, folder: Path, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        result = (True, function(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    if result[0]:
        # no rank may leave while another still asks it for something
        dist.barrier()


def run_processes(function: Callable, *args: object, folder: Path, world: int = 2) -> list:
    """``function(*args)`` in processes of one group; what each returned, by rank.

    They are forked, which is quick; that is safe as long as torch has started no threads here, and
    the suite lets it have one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_main, args=(rank, world, folder, function, args), daemon=True)
        for rank in range(world)
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded.*", category=DeprecationWarning)
        for process in processes:
            process.start()
    files = [folder / f"result-{rank}" for rank in range(world)]
    for process in processes:
        process.join(_LIMIT)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    results = [
        pickle.loads(file.read_bytes()) if file.is_file() else (False, "it did not end")
        for file in files
    ]
    wrong = [f"process {rank}: {what}" for rank, (ok, what) in enumerate(results) if not ok]
    assert not wrong, "\n".join(wrong)
    return [what for _, what in results]
