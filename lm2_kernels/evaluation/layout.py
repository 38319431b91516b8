"""A context, a question and its answer as a row of tokens, and rows as a batch to train on.

*Aligned*, the context fills whole segments and is padded at its end; question and answer follow in
segments of their own, padded at their front. So self-attention, which ends at the segment, never
sees a fact together with a question: only memory carries one to the other. And a question stands at
the end of its segment, where it may read nearly all slots, also under a rule by which a token reads
no slots later than its own place. *Running*, the words follow one another, wherever segments end.

Rows of as many segments are as long, which is how a batch of one size comes. Others are padded at
their end, and no label is there: what a causal model computes of a row, its loss and gradients are
then those of the row alone, without an ``attention_mask``. (The released gate with
``pooled_gate="segment"`` is not causal, and in running text sees its last segment's padding.) As
much padding in front would cost the same, and would be written into the memory.
"""

import dataclasses
from collections.abc import Sequence

import torch

from lm2_kernels.evaluation.samples import Sample, longest_answer, plain, plain_words, spoken
from lm2_kernels.training.data import Bytes, Words
from lm2_kernels.training.loop import Batch

__all__ = ["LAYOUTS", "LOSSES", "PAD", "Layout", "Row", "words"]

LAYOUTS = ("aligned", "running")
LOSSES = ("answers", "all")
# a word of no text; and for bytes the one that no text has
PAD = "<pad>"
_NUL = 0
_IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens of one sample: those up to the answer, the answer's, and padding behind.

    An answer that is a list has its end too (:func:`~lm2_kernels.evaluation.samples.spoken`).
    """

    prompt: list[int]
    answer: list[int]
    padding: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """How samples become tokens.

    Args:
        tokenizer: of the plain form (:func:`~lm2_kernels.evaluation.samples.plain`); words must
            have :data:`PAD` among them (:func:`words`).
        segment_length: of the model.
        kind: ``"aligned"`` or ``"running"``.
        loss: what labels are for: ``"answers"`` alone, or ``"all"`` that is read.

    Raises:
        ValueError: an option does not fit.
    """

    tokenizer: Words | Bytes
    segment_length: int
    kind: str = "aligned"
    loss: str = "answers"

    def __post_init__(self):
        for name, known in (("kind", LAYOUTS), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Layout: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if isinstance(self.tokenizer, Words) and PAD not in self.tokenizer.words:
            raise ValueError(f"Layout: the words must have {PAD} among them")

    @property
    def pad(self) -> int:
        """The token that stands where nothing is said."""
        return self.tokenizer.encode(PAD)[0] if isinstance(self.tokenizer, Words) else _NUL

    def count(self, text: str) -> int:
        """How many tokens a text has behind another, in its plain form."""
        return len(self._encode(text, " "))

    def row(self, sample: Sample, segments: int | None = None) -> Row:
        """The tokens of one sample.

        Args:
            sample: in the natural form; the plain one is made of it.
            segments: of the context, if the row is aligned; as many as it fills unless given.

        Raises:
            ValueError: the context does not fit into so many segments, or a word is not known.
        """
        answer = self._encode(spoken(sample), " ")
        if self.kind == "running":
            return Row(self.tokenizer.encode(plain(sample)[0]), answer, 0)
        context, question = self._encode(sample.context), self._encode(sample.question)
        size = self.segment_length
        filled = max(-(-len(context) // size), 1)
        if segments is not None and filled > segments:
            raise ValueError(
                f"a context of {len(context)} tokens does not fit into {segments} segments of "
                f"{size}"
            )
        # a place for the longest answer: where the question ends must not tell which it is
        room = longest_answer(sample, self.count)
        behind = (segments or filled) * size - len(context)
        front = -(len(question) + room) % size
        gap = [self.pad] * (behind + front)
        return Row(context + gap + question, answer, room - len(answer))

    def prompt(self, sample: Sample, segments: int | None = None) -> str:
        """What a model is asked that was trained on such rows, as a text of its tokenizer."""
        return self.tokenizer.decode(self.row(sample, segments).prompt)

    def collate(self, samples: Sequence[Sample], segments: int | None = None) -> Batch:
        """Samples as what the model takes, by the names of its arguments.

        Args:
            samples: of one batch.
            segments: as of :meth:`row`.

        Returns:
            "input_ids" and "labels", (B, L) each; labels are -100 but for the answers', or with
            ``loss="all"`` but for padding.
        """
        rows = [self.row(sample, segments) for sample in samples]
        longest = max(len(row.prompt) + len(row.answer) + row.padding for row in rows)
        input_ids = torch.full((len(rows), longest), self.pad)
        labels = torch.full_like(input_ids, _IGNORED)
        for ids, wanted, row in zip(input_ids, labels, rows, strict=True):
            first, end = len(row.prompt), len(row.prompt) + len(row.answer)
            ids[:end] = torch.tensor(row.prompt + row.answer)
            begin = first if self.loss == "answers" else 0
            wanted[begin:end] = ids[begin:end]
        return {"input_ids": input_ids, "labels": labels.where(labels != self.pad, _IGNORED)}

    def _encode(self, text: str, before: str = "") -> list[int]:
        return self.tokenizer.encode(before + " ".join(plain_words(text)))


def words(*lists: Sequence[str]) -> Words:
    """A tokenizer of :data:`PAD` and of the words of several lists, in order."""
    return Words((PAD, *sorted({word for some in lists for word in some})))
