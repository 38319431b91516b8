"""Other forms of the attention's kernels, as if hardware had found them to be the fastest."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

from torch import Tensor

from lm2_kernels.backends.triton import launch, memory_attention, tables

KERNELS = ("forward", "dkey_value", "dquery")


class Ran(NamedTuple):
    """What launches took that nobody had launched before, in order."""

    described: list[Tensor]
    configs: list[tables.AttentionConfig]


@contextlib.contextmanager
def measured(*found: tuple[str, int, tables.AttentionConfig], wave: int = 1) -> Iterator[Ran]:
    """As if hardware had found these (kernel, width, config) to be the fastest here, and as if a
    GPU had so few multiprocessors that a program for each is not worth other tiles.
    """
    ran = Ran([], [])
    chosen, few = {}, {}
    for kernel, width, config in found:
        if config.keeps_slots:
            few[kernel, "sm_90", width] = tables.Few(config)
        else:
            chosen[kernel, "sm_90", width] = config
    tiled, constants = memory_attention._tiled, memory_attention._constants

    def recorded_tensor(tensor: Tensor, *args: int) -> object:
        ran.described.append(tensor)
        return tiled(tensor, *args)

    def recorded_config(config: tables.AttentionConfig, *args: object) -> dict:
        ran.configs.append(config)
        return constants(config, *args)

    # what is remembered of launches says nothing of these
    launch.forget()
    try:
        with (
            mock.patch.dict(tables.MEASURED, chosen),
            mock.patch.dict(tables.MEASURED_FEW, few),
            mock.patch.object(tables, "_ONE_WAVE", wave),
            mock.patch.object(memory_attention, "_tiled", recorded_tensor),
            mock.patch.object(memory_attention, "_constants", recorded_config),
        ):
            yield ran
    finally:
        launch.forget()


def small(form: str, *, slots: int = 32) -> list[tuple[str, int, tables.AttentionConfig]]:
    """One configuration of each kernel for heads of up to 64, small enough for the interpreter.

    ``slots``: of a tile; the resident form, which keeps all, has twice as many.
    """
    if form == "resident":
        few = tables.AttentionConfig(32, 2 * slots, 8, 2, form)
        return [("forward", 64, few), ("dquery", 64, few)]
    tokens, warps = (64, 4) if form == "specialized" else (32, 8)
    sizes = {"forward": (tokens, slots), "dkey_value": (32, slots), "dquery": (tokens, slots)}
    return [
        (kernel, 64, tables.AttentionConfig(*sizes[kernel], warps, 2, form)) for kernel in KERNELS
    ]
