"""What the memory does while a run trains: lines of JSON, and TensorBoard's events, in its folder.

Every so many steps the model is watched (:func:`lm2_kernels.telemetry.watch`) while it reads that
step's batch, before the step changes it. What is trained is the same bit for bit.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import nn

from lm2_kernels.telemetry import Record, watch
from lm2_kernels.training.folder import EVENTS, TELEMETRY, keep_telemetry
from lm2_kernels.training.loop import Batch


class Telemetry:
    """Writes a line for every ``every``-th step of a run. To be closed.

    A run that goes on from step ``first`` has the lines up to there, and writes those that the run
    would have written that was not cut.

    Args:
        folder: of the run.
        model: what is watched; the run may train a wrapper of it.
        every: steps from line to line.
        first: steps that were done before.
    """

    def __init__(self, folder: Path, model: nn.Module, every: int, first: int):
        self._folder = folder
        self._model = model
        self._every = every
        self._first = first
        self._watch = contextlib.ExitStack()
        self._record: Record | None = None
        self._writer = None
        keep_telemetry(folder, first)

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of the steps from ``first`` on; the model is watched where a line is due."""
        for step, batch in enumerate(batches, self._first + 1):
            if step % self._every == 0:
                self._record = self._watch.enter_context(watch(self._model))
            yield batch

    def after_step(self, step: int) -> None:
        """Write the line of a step, if one is due.

        Raises:
            OSError: it cannot be written.
        """
        if self._record is None:
            return
        self._watch.close()
        record, self._record = self._record, None
        line = json.dumps({"step": step, **record.summary()}) + "\n"
        with (self._folder / TELEMETRY).open("a", encoding="utf-8") as file:
            file.write(line)
        if self._writer is None:
            self._writer = _writer(self._folder / EVENTS, self._first)
        if self._writer is not None:
            record.to_tensorboard(self._writer, step)

    def close(self) -> None:
        """End the watch, and what TensorBoard has open."""
        self._watch.close()
        if self._writer is not None:
            self._writer.close()


def _writer(folder: Path, first: int) -> object | None:
    """A writer of TensorBoard's events, None where it is not installed."""
    try:
        import PIL  # noqa: F401, PLC0415 - which its pictures are made by
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra of torch
    except ImportError:
        return None
    # events of later steps are of a run that was cut: TensorBoard leaves them out
    return SummaryWriter(str(folder), purge_step=first + 1)
