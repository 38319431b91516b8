"""What a run is trained on: an interface, and files behind it.

:class:`Data` is there before the model is, which has as many embeddings as its tokenizer has
tokens. With the model's configuration and the run's options it gives :class:`Batches`.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from lm2_kernels.model.config import LM2Config
from lm2_kernels.training import distributed
from lm2_kernels.training.data import Corpus, Tokenizer
from lm2_kernels.training.loop import Batch, mean_loss

__all__ = ["Batches", "Data", "FileBatches", "Files"]

# batches of the validation
_VALIDATION = 8


class Batches(Protocol):
    """Batches to train on, and how a trained model is validated."""

    summary: str  # how much there is, for the line before the first step
    notes: Sequence[str]  # what else is to be said then

    def train(self, *, first: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Batches, at least as many as the run has steps from ``first`` on.

        A batch is a function of the run's options and its number alone, and the processes together
        see what one alone would see.
        """

    def validate(
        self,
        model: nn.Module,
        *,
        rank: int,
        world: int,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> list[str]:
        """What a model makes of data that it was not trained on, in lines to print.

        All processes call it together.
        """


class Data(Protocol):
    """What a run is trained on."""

    tokenizer: Tokenizer
    vocab_size: int

    def completed(self, options: dict, config: LM2Config) -> dict:
        """A run's options, with what they are unless given.

        Raises:
            ValueError: one cannot be what it is.
        """

    def entries(self) -> list[dict]:
        """What ``run.json`` has of the data: "path" and "digest" of each of its parts."""

    def batches(self, options: dict, config: LM2Config) -> Batches:
        """Of a run's completed options.

        Raises:
            ValueError: the data do not fit them.
        """


@dataclasses.dataclass(frozen=True)
class Files:
    """Text files, or files of token ids."""

    paths: Sequence[Path]
    corpus: Corpus

    @property
    def tokenizer(self) -> Tokenizer:
        """Bytes, or ids."""
        return self.corpus.tokenizer

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return self.corpus.vocab_size

    def completed(self, options: dict, config: LM2Config) -> dict:
        """See :class:`Data`."""
        own = {"length": 4 * config.segment_length, "validation": 0.05}
        return options | {name: own[name] for name in own if options[name] is None}

    def entries(self) -> list[dict]:
        """See :class:`Data`."""
        return [
            {"path": str(path.resolve()), "digest": digest}
            for path, digest in zip(self.paths, self.corpus.digests(), strict=True)
        ]

    def batches(self, options: dict, config: LM2Config) -> "FileBatches":
        """See :class:`Data`."""
        seen, kept = self.corpus.split(options["validation"], options["length"])
        return FileBatches(seen, kept, options, left_out=len(self.paths) - len(seen.files))


@dataclasses.dataclass(frozen=True)
class FileBatches:
    """Windows of files, and of the ends of these."""

    seen: Corpus
    kept: Corpus
    options: dict
    left_out: int

    @property
    def summary(self) -> str:
        """See :class:`Batches`."""
        return f"{sum(map(len, self.seen.files)):,} tokens"

    @property
    def notes(self) -> list[str]:
        """See :class:`Batches`."""
        length = self.options["length"]
        line = f"{self.left_out} files are too short for windows of {length} tokens: left out"
        return [line] if self.left_out else []

    def train(self, *, first: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """See :class:`Batches`."""
        batch, length, seed = (self.options[name] for name in ("batch", "length", "seed"))
        return self.seen.batches(batch, length, seed, first=first, rank=rank, world=world)

    def validate(
        self,
        model: nn.Module,
        *,
        rank: int,
        world: int,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> list[str]:
        """See :class:`Batches`."""
        batch, length = self.options["batch"], self.options["length"]
        windows = self.kept.batches(batch, length, 0, rank=rank, world=world)
        loss = mean_loss(model, itertools.islice(windows, _VALIDATION), autocast=autocast)
        loss = distributed.mean(loss, device)
        # above, float64 overflows
        perplexity = math.exp(loss) if loss < 700.0 else math.inf
        return [
            f"validation loss {loss:.4f} ({loss / math.log(2):.3f} bits a token, perplexity "
            f"{perplexity:.2f})"
        ]
