"""Other forms of the attention's kernels, as if hardware had found them to be the fastest."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from torch import Tensor

from lm2_kernels.backends.triton import memory_attention, tables

KERNELS = ("forward", "dkey_value", "dquery")


@contextlib.contextmanager
def measured(
    *found: tuple[str, int, tables.AttentionConfig], wave: int = 0
) -> Iterator[list[Tensor]]:
    """As if hardware had found these (kernel, width, config) to be the fastest on sm_90, and as if
    a GPU had so few multiprocessors that a program for each is not worth other tiles.

    Gives the tensors that were described, in order.
    """
    chosen = {(kernel, "sm_90", width): config for kernel, width, config in found}
    described: list[Tensor] = []
    tiled = memory_attention._tiled

    def recorded(tensor: Tensor, *args: int) -> object:
        described.append(tensor)
        return tiled(tensor, *args)

    with (
        mock.patch.dict(tables.MEASURED, chosen),
        mock.patch.object(tables, "_ONE_WAVE", wave),
        mock.patch.object(memory_attention, "_tiled", recorded),
    ):
        yield described


def small(form: str, *, slots: int = 32) -> list[tuple[str, int, tables.AttentionConfig]]:
    """One configuration of each kernel for heads of up to 64, small enough for the interpreter."""
    tokens, warps = (64, 4) if form == "specialized" else (32, 8)
    sizes = {"forward": (tokens, slots), "dkey_value": (32, slots), "dquery": (tokens, slots)}
    return [
        (kernel, 64, tables.AttentionConfig(*sizes[kernel], warps, 2, form)) for kernel in KERNELS
    ]
