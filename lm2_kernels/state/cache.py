"""What a piece of a segment finds of the segment's earlier tokens, and leaves for later ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from lm2_kernels.chunks import num_rows, sum_by_slot

__all__ = ["CONSTANT", "SUM", "SegmentCache", "on_device", "read_rows", "write_rows"]

# how the names of tensors end that have no entry a token: a sum, and what a segment does not change
SUM = "sum"
CONSTANT = "constant"
# entries of a cache that grows, at least
_MIN_CAPACITY = 64


def on_device(values: Sequence, device: torch.device) -> Tensor:
    """A tensor of numbers that Python has; unlike ``torch.tensor``, waits for no device."""
    return torch.tensor(values, device="cpu").to(device, non_blocking=True)


class SegmentCache:
    """One piece of a segment: where it begins, and what was kept of the segment's earlier tokens.

    Cached tensors are (B, entries, ...) with entry ``j`` for the segment's token ``j``, or for slot
    ``j`` where rows of banks are kept; entries behind a row's position mean nothing. Without
    gradients new entries are written into the tensors, if the state they came from is the last of
    its stream; else they are copied. What is the same for a whole segment is kept as one tensor.

    Args:
        tensors: what was kept.
        starts: each row's position, or None where all are at 0. If they differ, the piece is one
            token long.
        num_tokens: T, the piece's length.
        segment_length: the most tokens of a segment, and so entries that there can be.
        lengths: how many of the T tokens of each row are real (the first ones); None is all.
        tokens_per_slot: c; token ``t`` of the segment is bound to slot ``t // c``.
        causal: whether a token sees the slots up to its own alone; else it sees all, as the segment
            found them.
        keep: whether the segment goes on after the piece.
        in_place: whether ``tensors`` may be written to.
    """

    # all but the prefix
    _SHARED = (
        "tensors",
        "starts",
        "start",
        "num_tokens",
        "size",
        "segment_length",
        "lengths",
        "tokens_per_slot",
        "causal",
        "keep",
        "is_open",
        "in_place",
        "_made",
    )

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        starts: Sequence[int] | None,
        num_tokens: int,
        segment_length: int,
        *,
        lengths: Sequence[int] | None = None,
        tokens_per_slot: int = 1,
        causal: bool = True,
        keep: bool = True,
        in_place: bool = False,
    ):
        self.tensors = dict(tensors)
        self.starts = starts
        # where all rows begin, None if they differ
        self.start = 0 if starts is None else starts[0] if len(set(starts)) == 1 else None
        if self.start is None and num_tokens != 1:
            raise ValueError(
                f"SegmentCache: rows at different positions take one token at a time, got "
                f"{num_tokens}"
            )
        self.num_tokens = num_tokens
        # entries that a row can have, with this piece
        self.size = (max(starts) if self.start is None else self.start) + num_tokens
        if self.size > segment_length:
            raise ValueError(
                f"SegmentCache: a segment has at most {segment_length} tokens, and "
                f"{self.size - num_tokens} came before; a piece of {num_tokens} is to be cut at "
                f"the segment's end"
            )
        self.segment_length = segment_length
        self.lengths = lengths
        self.tokens_per_slot = tokens_per_slot
        self.causal = causal
        self.keep = keep
        # a whole segment in one piece neither finds nor leaves anything
        self.is_open = keep or self.start != 0
        self.in_place = in_place
        self._prefix = ""
        # what all layers ask for: made once a piece, as each is a copy to the device
        self._made: dict[tuple[str, torch.device], object] = {}

    def scope(self, prefix: str) -> "SegmentCache":
        """The same cache, in which every name begins with ``prefix``."""
        # not copy.copy: torch.compile of torch 2.11 does not trace it
        scoped = object.__new__(SegmentCache)
        for name in self._SHARED:
            setattr(scoped, name, getattr(self, name))
        scoped._prefix = f"{self._prefix}{prefix}."
        return scoped

    def _once(self, name: str, device: torch.device, make: Callable[[], object]) -> object:
        if (name, device) not in self._made:
            self._made[name, device] = make()
        return self._made[name, device]

    @property
    def writes_rows(self) -> bool:
        """Whether the piece's layers write rows (B, R, D) of slots, in a single pass.

        Else they give each token's proposal (B, T, D), of which the state makes rows when a slot's
        last token has come: for several tokens a slot in float32 (float64 for float64).
        """
        return self.tokens_per_slot == 1 or (not self.is_open and self.lengths is None)

    def positions(self, device: torch.device) -> Tensor:
        """The piece's tokens by their places in the segment: (T,), or (B, 1) where rows differ."""

        def make() -> Tensor:
            if self.start is not None:
                return torch.arange(self.start, self.start + self.num_tokens, device=device)
            return on_device(self.starts, device)[:, None]

        return self._once("positions", device, make)

    def visible(self, device: torch.device) -> Tensor:
        """For rows that differ: which entries the piece's one token sees, (B, entries) bool."""

        def make() -> Tensor:
            return torch.arange(self.size, device=device) <= self.positions(device)

        return self._once("visible", device, make)

    def index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """For rows that differ: the row and the place of each one's token."""

        def make() -> tuple[Tensor, Tensor]:
            position = self.positions(device)[:, 0]
            return torch.arange(len(position), device=device), position

        return self._once("index", device, make)

    def slots(self, device: torch.device) -> tuple[Tensor, Tensor] | Tensor:
        """The slots of the piece's tokens, (T,); for rows that differ the row and the slot."""

        def make() -> tuple[Tensor, Tensor] | Tensor:
            if self.start is not None:
                return self.positions(device) // self.tokens_per_slot
            row, position = self.index(device)
            return row, position // self.tokens_per_slot

        return self._once("slots", device, make)

    def rows_of(self, bank: Tensor) -> Tensor:
        """The rows of a bank (B, N, D) that the piece's tokens are bound to, (B, R, D)."""
        if self.start is None:
            return bank[self.slots(bank.device)][:, None]
        c = self.tokens_per_slot
        return read_rows(bank, self.start // c, num_rows(self.size, c))

    def by_token(self, rows: Tensor) -> Tensor:
        """Rows (B, R, ...) of :meth:`rows_of`'s slots as rows of the piece's tokens (B, T, ...)."""
        if self.start is None or self.tokens_per_slot == 1:
            return rows
        first = self.start // self.tokens_per_slot
        return rows.index_select(1, self.slots(rows.device) - first)

    def real(self, device: torch.device) -> Tensor | None:
        """Which tokens are real, (B, T, 1) bool; None if all are."""
        if self.lengths is None:
            return None

        def make() -> Tensor:
            lengths = on_device(self.lengths, device)[:, None, None]
            return torch.arange(self.num_tokens, device=device)[:, None] < lengths

        return self._once("real", device, make)

    def tokens_read(self, batch: int, device: torch.device) -> Tensor:
        """How many tokens of its segment each row has read with the piece, at least 1. (B,)"""
        return self._once(
            "tokens read", device, lambda: on_device(self.ends(batch), device).clamp(min=1)
        )

    def ends(self, batch: int) -> list[int]:
        """Each row's position after the piece."""
        starts, lengths = self.starts or [0] * batch, self.lengths or [self.num_tokens] * batch
        return [start + length for start, length in zip(starts, lengths, strict=True)]

    def kept(self, name: str) -> Tensor | None:
        """What is kept under a name, the piece's own once its layer has run; None if nothing is."""
        return self.tensors.get(self._prefix + name)

    def extend(self, name: str, new: Tensor) -> Tensor:
        """Keep the piece's entries.

        Args:
            name: of the tensor.
            new: (B, T, ...).

        Returns:
            (B, entries, ...), those of all tokens so far, perhaps a view.
        """
        if not self.is_open:
            return new
        return self._extend(name, new, 1)

    def _extend(self, name: str, new: Tensor, tokens_per_entry: int) -> Tensor:
        """:meth:`extend` with an entry for so many tokens; the last of them is rewritten."""
        name = self._prefix + name
        old, size = self._get(name, new), num_rows(self.size, tokens_per_entry)
        start = None if self.start is None else self.start // tokens_per_entry
        index = None
        if start is None:
            index = self.index(new.device) if tokens_per_entry == 1 else self.slots(new.device)
        if torch.is_grad_enabled():
            kept = _joined(old, new, start, size, index)
        else:
            kept = self._room(old, new, size, num_rows(self.segment_length, tokens_per_entry))
            if start is None:
                kept[index] = new[:, 0]
            else:
                kept[:, start:size] = new
        self.tensors[name] = kept
        return kept[:, :size]

    def write(self, name: str, new: Tensor, dtype: torch.dtype) -> None:
        """Keep what the piece's layers write to a bank: see :attr:`writes_rows`.

        With several tokens a slot, an entry means something when its last token has come. Until
        then there is the sum of the slot's proposals, which no earlier state has in its hands.

        Args:
            name: of the bank's rows.
            new: (B, T, D).
            dtype: of the bank.
        """
        c = self.tokens_per_slot
        if c == 1:
            self._extend(name, new, 1)
            return
        real, before = self.real(new.device), self.running_sum(name)
        if real is not None:
            # what the padding proposes may be NaN
            new = torch.where(real, new, 0.0)
        if self.start is None:
            goes_on = self.positions(new.device) % c > 0
            left = new[:, 0] if before is None else new[:, 0] + torch.where(goes_on, before, 0.0)
            sums = left[:, None]
        else:
            first = self.start % c
            sums = sum_by_slot(new, c, first)
            if first:
                sums = torch.cat([sums[:, :1] + before[:, None], sums[:, 1:]], dim=1)
            left = self._unfinished(sums)
        self._extend(name, (sums / c).to(dtype), c)
        self.tensors[self._sum_name(name)] = left[:, None]

    def _unfinished(self, sums: Tensor) -> Tensor:
        """Of the sums (B, R, D) of a piece's slots that of the slot that each row goes on with.

        Any sum where the row's next token begins a slot.
        """
        if self.lengths is None:
            return sums[:, -1]
        first = self.start // self.tokens_per_slot
        last = [end // self.tokens_per_slot - first for end in self.ends(sums.shape[0])]
        index = on_device([min(slot, sums.shape[1] - 1) for slot in last], sums.device)
        return sums[torch.arange(sums.shape[0], device=sums.device), index]

    def constant(
        self,
        name: str,
        new: Callable[[Tensor | None], Tensor],
        like: Tensor,
        shape: tuple[int, ...],
    ) -> Tensor:
        """What is the same for all of a segment's pieces: made by its first one.

        Where rows differ and one begins a segment, all are copied: earlier states have those of the
        segment before.

        Args:
            name: of the tensor.
            new: makes it, of these rows; None is all.
            like: what its dtype and device are.
            shape: its own, (B, ...).
        """
        name = self._prefix + self.constant_name(name)
        if not self.is_open:
            return new(None)
        if self.start == 0:
            self.tensors[name] = new(None)
            return self.tensors[name]
        kept = self.tensors.get(name)
        if kept is None:
            self._refuse_missing(name)
        _check_kept(name, kept, like, tuple(kept.shape), shape)
        if self.start is None and 0 in self.starts:
            begun = [row for row, start in enumerate(self.starts) if start == 0]
            rows = self._once("begun", kept.device, lambda: on_device(begun, kept.device))
            kept = kept.index_copy(0, rows, new(rows))
        elif kept.is_inference() and not torch.is_inference_mode_enabled():
            # autograd keeps none of those
            kept = kept.clone()
        self.tensors[name] = kept
        return kept

    @staticmethod
    def constant_name(name: str) -> str:
        """Under which name :meth:`constant` keeps a tensor."""
        return f"{name}.{CONSTANT}"

    def _sum_name(self, name: str) -> str:
        return f"{self._prefix}{name}.{SUM}"

    def running_sum(self, name: str) -> Tensor | None:
        """What :meth:`set_running_sum` kept: (B, ...), 0 for rows at the start of a segment."""
        kept = self.tensors.get(self._sum_name(name))
        if kept is None or self.start == 0:
            return None
        kept = kept[:, 0]
        if self.start is not None:
            return kept
        begun = self.positions(kept.device) > 0
        return torch.where(begun.view(-1, *[1] * (kept.dim() - 1)), kept, 0.0)

    def set_running_sum(self, name: str, value: Tensor) -> None:
        """Keep a sum over the segment's real tokens, (B, ...)."""
        if self.is_open:
            self.tensors[self._sum_name(name)] = value[:, None]

    def _get(self, name: str, new: Tensor) -> Tensor | None:
        old = self.tensors.get(name)
        if old is None:
            if self.start != 0:
                self._refuse_missing(name)
            return None
        _check_kept(name, old, new, tuple(old.shape[2:]), tuple(new.shape[2:]))
        return old

    def _refuse_missing(self, name: str) -> NoReturn:
        raise ValueError(
            f"SegmentCache: the segment has tokens but no '{name}': the state is of another model"
        )

    def _room(self, old: Tensor | None, new: Tensor, size: int, most: int) -> Tensor:
        """A tensor with the old entries, and with room for the piece's up to ``size``."""
        usable = (
            old is not None
            and self.in_place
            and old.shape[1] >= size
            and old.is_inference() == torch.is_inference_mode_enabled()
        )
        if usable:
            return old
        capacity = min(most, max(2 * size, _MIN_CAPACITY))
        # zeros: entries that mean nothing still meet a factor of 0 in some attention
        room = new.new_zeros(new.shape[0], capacity, *new.shape[2:])
        if old is not None:
            num_old = min(old.shape[1], size)
            room[:, :num_old] = old[:, :num_old]
        return room


def _check_kept(
    name: str, old: Tensor, new: Tensor, shape: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    """Raise ValueError unless what was kept goes with what a piece computes."""
    for what, got, want in (
        ("dtype", old.dtype, new.dtype),
        ("device", old.device, new.device),
        ("shape", shape, wanted),
    ):
        if got != want:
            raise ValueError(
                f"SegmentCache: '{name}' was kept with {what} {got}, but the piece has {want}; go "
                f"on as the segment began, or end it with MemoryState.end_segment()"
            )


def _joined(
    old: Tensor | None,
    new: Tensor,
    start: int | None,
    size: int,
    index: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Old and new entries as a tensor of its own, through which gradients flow."""
    if start == 0:
        return new
    if start is not None:
        return torch.cat([old[:, :start], new], dim=1)
    missing = size - old.shape[1]
    if missing > 0:
        padding = old.new_zeros(old.shape[0], missing, *old.shape[2:])
        old = torch.cat([old, padding], dim=1)
    return old.index_put(index, new[:, 0])


def read_rows(memory: Tensor, start: int, end: int) -> Tensor:
    """The rows of a bank (B, N, D) from ``start`` to ``end``, (B, T, D)."""
    if torch.compiler.is_compiling() and not is_known(end - start == memory.shape[1]):
        # whether a view is contiguous would depend on T, which a graph may have as a symbol
        return memory.index_select(1, torch.arange(start, end, device=memory.device))
    return memory[:, start:end]


def write_rows(memory: Tensor, rows: Tensor, slot_offset: int) -> Tensor:
    """The bank (B, N, D) with the rows from ``slot_offset`` on replaced by (B, T, D)."""
    end = slot_offset + rows.shape[1]
    if slot_offset == 0 and is_known(end == memory.shape[1]):
        return rows
    if torch.compiler.is_compiling():
        # as above
        return torch.slice_scatter(memory, rows, dim=1, start=slot_offset, end=end)
    return torch.cat([memory[:, :slot_offset], rows, memory[:, end:]], dim=1)


def is_known(condition: bool) -> bool:
    """Whether a condition is true; in a graph, whether it is for all sizes that the graph takes."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # noqa: PLC0415

    return statically_known_true(condition)
