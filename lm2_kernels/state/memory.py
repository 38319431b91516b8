"""The state that a model carries from call to call, as one explicit value.

Between segments it is the memory banks alone. Within a segment it also has each row's position, and
what the layers keep of the segment's tokens (keys, values, running sums) in the tensors of a
:class:`SegmentCache`.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lm2_kernels.backends.contract import accumulation_dtype
from lm2_kernels.chunks import num_rows
from lm2_kernels.state.cache import CONSTANT, SUM, SegmentCache, on_device, write_rows
from lm2_kernels.state.files import read_state, write_state

__all__ = ["MemoryState", "join_banks", "part_banks"]

_FORMAT = "lm2_kernels.MemoryState"


class _Stream:
    """Which of the states that share buffers is the last: it alone may write into them, once."""

    def __init__(self):
        self.last = 0
        self._free = {0: True}

    def claim(self, number: int) -> bool:
        """Whether whoever goes on from the state ``number`` may write; of several one alone may.

        They may be threads: ``dict.pop`` is one step, and needs no lock, which would not pickle.
        """
        return self._free.pop(number, False)

    def advance(self) -> None:
        """Begin the state after the one that was claimed."""
        self.last += 1
        self._free = {self.last: True}


class MemoryState:
    """The memory between two calls, and within a segment what streaming needs. Never changed: every
    method returns a new state.

    Args:
        banks: tensors (B, N, D): one where the memory flows through depth, one a memory layer where
            it flows through time.

    Raises:
        TypeError, ValueError: the banks are not tensors of one shape.
    """

    def __init__(self, banks: Sequence[Tensor]):
        banks = tuple(banks)
        for bank in banks:
            if not isinstance(bank, Tensor) or not bank.is_floating_point():
                raise TypeError("MemoryState: banks must be floating-point tensors")
            if bank.dim() != 3 or bank.shape != banks[0].shape or bank.dtype != banks[0].dtype:
                shapes = [(tuple(bank.shape), bank.dtype) for bank in banks]
                raise ValueError(
                    f"MemoryState: banks must all be of one (B, N, D) and dtype, got {shapes}"
                )
        if not banks:
            raise ValueError("MemoryState: no bank")
        self._set(banks, None, {}, banks[0].shape[0], None, 1)

    # how the segment that has begun binds its tokens; older pickles have none
    _tokens_per_slot: int = 1

    def _set(self, incoming, starts, cache, batch, stream, tokens_per_slot) -> None:
        # the banks as the segment found them; what it wrote is in the cache
        self._incoming: tuple[Tensor, ...] = incoming
        # None: every row is between two segments, and the cache is empty
        self._starts: tuple[int, ...] | None = starts
        self._tokens_per_slot = tokens_per_slot
        self._cache: dict[str, Tensor] = cache
        self._batch: int = batch
        # None: others may hold the cache's tensors
        self._stream: _Stream | None = stream
        self._number = 0 if stream is None else stream.last

    @classmethod
    def _make(
        cls,
        incoming: Sequence[Tensor],
        starts: Sequence[int] | None,
        cache: Mapping[str, Tensor],
        batch: int,
        stream: _Stream | None = None,
        tokens_per_slot: int = 1,
    ) -> "MemoryState":
        state = cls.__new__(cls)
        if starts is None or not any(starts):
            starts, cache, stream, tokens_per_slot = None, {}, None, 1
        starts = None if starts is None else tuple(starts)
        state._set(tuple(incoming), starts, dict(cache), batch, stream, tokens_per_slot)
        return state

    @classmethod
    def without_banks(cls, batch: int) -> "MemoryState":
        """The state of a model that has no memory layer, but keeps a segment's tokens."""
        return cls._make((), None, {}, batch)

    @property
    def batch(self) -> int:
        """B."""
        return self._batch

    @property
    def nbytes(self) -> int:
        """Bytes of the banks, and of what is kept within a segment."""
        return sum(tensor.nbytes for tensor in (*self._incoming, *self._cache.values()))

    @property
    def position(self) -> Tensor:
        """(B,) int64 on the CPU: how many tokens of its segment each row has read."""
        return torch.tensor(self._starts or [0] * self.batch, dtype=torch.int64)

    @property
    def start(self) -> int | None:
        """The position of every row, None where they differ."""
        if self._starts is None:
            return 0
        return self._starts[0] if len(set(self._starts)) == 1 else None

    @property
    def banks(self) -> tuple[Tensor, ...]:
        """The banks (B, N, D), with the rows that the segment has written so far."""
        if self._starts is None:
            return self._incoming
        return tuple(self._written(index, bank) for index, bank in enumerate(self._incoming))

    def _written(self, index: int, bank: Tensor) -> Tensor:
        """A bank with what the segment has written to it so far."""
        rows, c = self._cache[_rows_name(index)][:, : bank.shape[1]], self._tokens_per_slot
        slots = torch.arange(rows.shape[1], device=bank.device)
        starts = on_device(self._starts, bank.device)[:, None]
        old, rest = bank[:, : rows.shape[1]], bank[:, rows.shape[1] :]
        if c > 1:
            # of a slot whose tokens have not all come, the mean of those that have
            total = self._cache[f"{_rows_name(index)}.{SUM}"]
            mean = (total / (starts % c).clamp(min=1)[:, :, None]).to(bank.dtype)
            is_open = (slots == starts // c) & (starts % c > 0)
            old = torch.where(is_open[:, :, None], mean, old)
        is_new = slots < starts // c
        return torch.cat([torch.where(is_new[:, :, None], rows, old), rest], dim=1)

    def __repr__(self) -> str:
        text = f"MemoryState(batch {self.batch}"
        if self._incoming:
            bank = self._incoming[0]
            text += f", {len(self._incoming)} banks {tuple(bank.shape)}, {bank.dtype}"
            text += f", {bank.device}"
        return f"{text}, position {list(self._starts)})" if self._starts else f"{text})"

    def check(
        self,
        num_banks: int,
        batch: int,
        slots: int,
        dim: int,
        segment_length: int,
        tokens_per_slot: int = 1,
    ) -> None:
        """Raise ValueError unless the state is of these sizes; a batch of 1 is not expanded."""
        if len(self._incoming) != num_banks:
            raise ValueError(
                f"MemoryState: the model has {num_banks} memory banks, the state "
                f"{len(self._incoming)}: it is of another configuration"
            )
        wanted = (slots, dim)
        got = tuple(self._incoming[0].shape[1:]) if self._incoming else wanted
        if got != wanted:
            raise ValueError(
                f"MemoryState: the model's banks are (slots, width) = {wanted}, the state's "
                f"{got}: it is of another configuration"
            )
        if max(self._starts or [0]) >= segment_length:
            raise ValueError(
                f"MemoryState: the state stands at {max(self._starts)}, but the model's segments "
                f"have {segment_length} tokens: it is of another configuration"
            )
        if self._starts is not None and self._incoming and self._tokens_per_slot != tokens_per_slot:
            raise ValueError(
                f"MemoryState: the segment binds {self._tokens_per_slot} tokens to a slot, the "
                f"model {tokens_per_slot}: it is of another configuration; end it with "
                f"end_segment(), after which the banks alone are left"
            )
        if self.batch != batch:
            raise ValueError(
                f"MemoryState: the input has {batch} rows, the state {self.batch}; give each row "
                f"its own with select() or expand()"
            )

    def check_cache(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless a segment that has begun kept tensors (B, entries, *shape)."""
        if self._starts is None:
            return
        got = {
            name: tuple(tensor.shape[2:])
            for name, tensor in self._cache.items()
            if not self._is_of_banks(name)
        }
        if got != dict(shapes):
            names = sorted(set(got.items()) ^ set(shapes.items()))
            raise ValueError(
                f"MemoryState: within the segment the state keeps other tensors than the model: "
                f"{names}; it is of another configuration"
            )

    def _is_of_banks(self, name: str) -> bool:
        """Whether a tensor of the cache is what a bank's rows are made of."""
        rows = name.removesuffix(f".{SUM}")
        return any(rows == _rows_name(index) for index in range(len(self._incoming)))

    def _like(
        self,
        incoming: Iterable[Tensor],
        starts: Sequence[int] | None,
        cache: Mapping[str, Tensor],
        batch: int,
        stream: _Stream | None = None,
    ) -> "MemoryState":
        """A state of this one's kind."""
        return self._make(incoming, starts, cache, batch, stream, self._tokens_per_slot)

    def _map(self, function: Callable[[Tensor], Tensor], batch: int) -> "MemoryState":
        cache = {name: function(tensor) for name, tensor in self._cache.items()}
        return self._like(map(function, self._incoming), self._starts, cache, batch)

    def detach(self) -> "MemoryState":
        """Without its history: gradients stop here."""
        if not any(t.requires_grad for t in (*self._incoming, *self._cache.values())):
            return self
        return self._map(torch.Tensor.detach, self.batch)

    def to(self, *args: Any, **kwargs: Any) -> "MemoryState":
        """On another device or in another dtype, as ``Tensor.to``.

        The dtype is the memory's. Keys, values and sums of a segment that has begun stay as the
        model computed them.
        """
        moved = self._map(lambda tensor: tensor.to(*args, **kwargs), self.batch)
        for name, tensor in self._cache.items():
            now = moved._cache[name]
            if not self._is_of_banks(name):
                moved._cache[name] = tensor.to(now.device)
            elif name.endswith(f".{SUM}"):
                moved._cache[name] = tensor.to(now.device, accumulation_dtype(now))
        return moved

    def end_segment(self) -> "MemoryState":
        """Between two segments: the next token of every row starts a new one."""
        return self._make(self.banks, None, {}, self.batch)

    def select(self, rows: Tensor | Sequence[int]) -> "MemoryState":
        """The batch rows of these indices, in this order and as often as they come."""
        index = self._index(rows)
        return self._select(index.tolist(), index)

    def _select(self, rows: list[int], index: Tensor) -> "MemoryState":
        def chosen(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index.to(tensor.device, non_blocking=True))

        state = self._map(chosen, len(rows))
        starts = None if self._starts is None else [self._starts[row] for row in rows]
        # index_select copies: the buffers are this state's own
        return self._like(state._incoming, starts, state._cache, len(rows), _Stream())

    def expand(self, times: int) -> "MemoryState":
        """Each batch row this many times in a row, as beam search wants them."""
        if not isinstance(times, int) or times < 1:
            raise ValueError(f"MemoryState.expand: times must be an int of at least 1, got {times}")
        rows = [row for row in range(self.batch) for _ in range(times)]
        return self._select(rows, torch.tensor(rows, dtype=torch.int64))

    def reset(self, rows: Tensor | Sequence[int], initial: "MemoryState") -> "MemoryState":
        """These batch rows as they are before the first segment, the others as they are.

        Args:
            rows: indices, or a bool tensor (B,).
            initial: what to reset to, of batch 1: ``model.initial_state(1)``.
        """
        if initial.batch != 1:
            raise ValueError(f"MemoryState.reset: initial must be of batch 1, got {initial.batch}")
        sizes = self._incoming[0].shape[1:] if self._incoming else (1, 0)
        initial = initial.end_segment()
        initial.check(len(self._incoming), 1, *sizes, segment_length=1)
        chosen = set(self._index(rows).tolist())
        starts = [
            0 if row in chosen else start
            for row, start in enumerate(self._starts or [0] * self.batch)
        ]
        mask = [row in chosen for row in range(self.batch)]
        # not a product with 0 or 1: what is reset may be NaN
        banks = [
            torch.where(on_device(mask, old.device)[:, None, None], new.to(old), old)
            for old, new in zip(self._incoming, initial.banks, strict=True)
        ]
        cache = {
            name: tensor.masked_fill(
                on_device(mask, tensor.device).view(-1, *[1] * (tensor.dim() - 1)), 0.0
            )
            for name, tensor in self._cache.items()
        }
        return self._like(banks, starts, cache, self.batch, _Stream())

    @classmethod
    def cat(cls, states: Sequence["MemoryState"]) -> "MemoryState":
        """The batch rows of several states of one model, one state after the other."""
        states = list(states)
        if not states:
            raise ValueError("MemoryState.cat: no state")
        kinds = {(tuple(b.shape[1:]), b.dtype, b.device) for s in states for b in s._incoming}
        numbers = {len(state._incoming) for state in states}
        within = [state for state in states if state._starts is not None]
        kept = {(frozenset(state._cache), state._tokens_per_slot) for state in within}
        if max(len(kinds), len(numbers), len(kept)) > 1:
            raise ValueError(f"MemoryState.cat: states of several configurations: {states}")
        incoming = [torch.cat(banks) for banks in zip(*(s._incoming for s in states), strict=True)]
        starts = [start for state in states for start in state._starts or [0] * state.batch]
        cache = {}
        for name in dict.fromkeys(itertools.chain(*(state._cache for state in states))):
            like = next(state._cache[name] for state in states if name in state._cache)
            entries = max(s._cache[name].shape[1] for s in states if name in s._cache)
            cache[name] = torch.cat([state._padded(name, like, entries) for state in states])
        like = within[0] if within else states[0]
        return like._like(incoming, starts, cache, len(starts), _Stream())

    def _padded(self, name: str, like: Tensor, entries: int) -> Tensor:
        """A tensor of the cache with so many entries; zeros where there is none."""
        kept = self._cache.get(name, like[:0])
        shape = (self.batch, entries - kept.shape[1] if kept.shape[0] else entries, *like.shape[2:])
        if 0 in shape[1:2]:
            return kept
        padding = like.new_zeros(shape)
        return torch.cat([kept, padding], dim=1) if kept.shape[0] else padding

    def _index(self, rows: Tensor | Sequence[int]) -> Tensor:
        index = torch.as_tensor(rows, device="cpu")
        if index.dtype == torch.bool and index.shape == (self.batch,):
            return index.nonzero()[:, 0]
        if index.numel() == 0:
            index = index.long()
        if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"MemoryState: rows must be integer indices, or a bool tensor ({self.batch},), got "
                f"{index.dtype} {tuple(index.shape)}"
            )
        if ((index < 0) | (index >= self.batch)).any():
            raise ValueError(
                f"MemoryState: rows must be from 0 to {self.batch - 1}, got {index.tolist()}"
            )
        return index.long()

    def piece(
        self,
        num_tokens: int,
        segment_length: int,
        *,
        lengths: Sequence[int] | None = None,
        tokens_per_slot: int = 1,
        causal: bool = True,
        keep: bool,
    ) -> tuple[list[Tensor], SegmentCache]:
        """For the layers: what the next T tokens read of each bank, and their cache.

        That is the tokens' rows (B, T, D), or without ``causal`` the whole bank (B, N, D), as the
        segment found it. Arguments as of :class:`SegmentCache`.
        """
        if self._starts is not None and self._incoming and tokens_per_slot != self._tokens_per_slot:
            raise ValueError(
                f"MemoryState: the segment binds {self._tokens_per_slot} tokens to a slot, the "
                f"piece {tokens_per_slot}; go on as it began, or end it with end_segment()"
            )
        is_kept = self._stream is not None and not torch.is_grad_enabled()
        in_place = is_kept and self._stream.claim(self._number)
        cache = SegmentCache(
            self._cache,
            self._starts,
            num_tokens,
            segment_length,
            lengths=lengths,
            tokens_per_slot=tokens_per_slot,
            causal=causal,
            keep=keep,
            in_place=in_place,
        )
        if not causal:
            return list(self._incoming), cache
        return [cache.rows_of(bank) for bank in self._incoming], cache

    def after(self, cache: SegmentCache, new_rows: Sequence[Tensor]) -> "MemoryState":
        """The state after a piece, from its cache and what it writes to each bank.

        That is (B, T, D), a row or a proposal of each token, or the slots' rows (B, R, D): see
        :attr:`SegmentCache.writes_rows`.
        """
        if not cache.is_open and cache.writes_rows:
            banks = []
            for bank, new in zip(self._incoming, new_rows, strict=True):
                real = cache.real(new.device)
                rows = new if real is None else torch.where(real, new, bank[:, : cache.size])
                banks.append(write_rows(bank, rows, 0))
            return self._make(banks, None, {}, self.batch)
        for index, (bank, new) in enumerate(zip(self._incoming, new_rows, strict=True)):
            cache.write(_rows_name(index), new, bank.dtype)
        stream = None
        if not torch.is_grad_enabled():
            # from here on this state's own cache is another's to write to
            stream = self._stream if cache.in_place else _Stream()
            stream.advance()
        starts, c = cache.ends(self.batch), cache.tokens_per_slot
        now = self._make(self._incoming, starts, cache.tensors, self.batch, stream, c)
        if not cache.keep:
            return now.end_segment()
        if cache.segment_length in starts:
            full = [start == cache.segment_length for start in starts]
            banks = now.banks
            if not all(full):
                is_full = [on_device(full, bank.device)[:, None, None] for bank in banks]
                banks = map(torch.where, is_full, banks, self._incoming)
            # the rows that begin anew will write over entries that earlier states still read
            starts = [start % cache.segment_length for start in starts]
            return self._make(banks, starts, cache.tensors, self.batch, tokens_per_slot=c)
        return now

    def to_tensors(self) -> dict[str, Tensor]:
        """All that the state is, as tensors with names, for a file."""
        most = max(self._starts or [0])
        tensors = {f"bank.{index}": bank for index, bank in enumerate(self._incoming)}
        for name, tensor in self._cache.items():
            is_whole = name.endswith(f".{CONSTANT}")
            tokens = self._tokens_per_slot if self._is_of_banks(name) else 1
            tensors[f"cache.{name}"] = tensor if is_whole else tensor[:, : num_rows(most, tokens)]
        tensors["position"] = self.position
        if self._tokens_per_slot > 1:
            tensors["tokens_per_slot"] = torch.tensor(self._tokens_per_slot)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "MemoryState | None":
        """The state of which :meth:`to_tensors` made these; None if they are none."""
        kinds = ("bank", "cache", "position", "tokens_per_slot")
        groups: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            groups.get(kind, {})[rest] = tensor
        banks = [groups["bank"].get(str(index)) for index in range(len(groups["bank"]))]
        position = groups["position"].get("")
        # older files have none: they bind a token to a slot
        tokens_per_slot = groups["tokens_per_slot"].get("", torch.tensor(1))
        if not _fits(banks, position, groups["cache"], tokens_per_slot):
            return None
        starts, c = position.tolist(), int(tokens_per_slot)
        return cls._make(banks, starts, groups["cache"], len(starts), _Stream(), c)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        write_state(path, self.to_tensors(), {"format": _FORMAT})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "MemoryState":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is damaged, or holds something else.
        """
        tensors, notes = read_state(path, device)
        state = cls.from_tensors(tensors)
        if notes.get("format") != _FORMAT or state is None:
            raise ValueError(f"MemoryState.load: {path} holds no memory state")
        return state


def _fits(
    banks: list[Tensor | None],
    position: Tensor | None,
    cache: dict[str, Tensor],
    tokens_per_slot: Tensor,
) -> bool:
    """Whether tensors of a file go together as a state."""
    for tensor, rank in ((position, 1), (tokens_per_slot, 0)):
        if tensor is None or tensor.dtype != torch.int64 or tensor.dim() != rank:
            return False
    starts, c = position.tolist(), int(tokens_per_slot)
    most, batch = max(starts, default=0), len(starts)
    if min(starts, default=0) < 0 or c < 1:
        return False
    rows = {_rows_name(index) for index in range(len(banks))}

    like = banks[0] if banks else None

    def has_entries(name: str, tensor: Tensor) -> bool:
        if name.endswith(f".{CONSTANT}"):
            return like is not None and tensor.shape[1] == like.shape[1]
        if name.endswith(f".{SUM}"):
            return tensor.shape[1] == 1
        return tensor.shape[1] >= num_rows(most, c if name in rows else 1)

    def is_of_bank(name: str, tensor: Tensor) -> bool:
        if name.removesuffix(f".{SUM}") not in rows:
            return True
        dtype = accumulation_dtype(like) if name.endswith(f".{SUM}") else like.dtype
        return tensor.dtype == dtype and tensor.shape[2:] == like.shape[2:]

    wanted = rows if c == 1 else rows | {f"{name}.{SUM}" for name in rows}
    return (
        all(
            bank is not None
            and bank.is_floating_point()
            and bank.dim() == 3
            and bank.shape == banks[0].shape
            and bank.dtype == banks[0].dtype
            and bank.shape[0] == batch
            and num_rows(most + 1, c) <= bank.shape[1]
            for bank in banks
        )
        and all(
            tensor.is_floating_point()
            and tensor.dim() >= 3
            and tensor.shape[0] == batch
            and has_entries(name, tensor)
            and is_of_bank(name, tensor)
            for name, tensor in cache.items()
        )
        and (most == 0 or wanted <= set(cache))
    )


def join_banks(states: Sequence[MemoryState]) -> MemoryState:
    """States of one bank (B, N, D) each, which stand at one place, as one state of several banks.

    What state ``i`` keeps of a segment as ``name`` is then ``i.name``.
    """
    banks, cache = [], {}
    for index, state in enumerate(states):
        banks += state._incoming
        for name, tensor in state._cache.items():
            own, rows = _rows_name(0), _rows_name(index)
            new = name.replace(own, rows, 1) if state._is_of_banks(name) else f"{index}.{name}"
            cache[new] = tensor
    return states[0]._like(banks, states[0]._starts, cache, states[0].batch)


def part_banks(state: MemoryState) -> list[MemoryState]:
    """The states of which :func:`join_banks` made one."""
    states = []
    for index, bank in enumerate(state._incoming):
        rows, prefix, cache = _rows_name(index), f"{index}.", {}
        for name, tensor in state._cache.items():
            if name.removesuffix(f".{SUM}") == rows:
                cache[name.replace(rows, _rows_name(0), 1)] = tensor
            elif name.startswith(prefix):
                cache[name.removeprefix(prefix)] = tensor
        states.append(state._like([bank], state._starts, cache, state.batch))
    return states


def _flatten(state: MemoryState) -> tuple[list[Tensor], tuple]:
    """The tensors of a state, and the rest; for torch.export, and whoever walks through outputs."""
    tensors, names = [*state._incoming, *state._cache.values()], tuple(state._cache)
    # no number that a graph may have as a symbol, where a tensor has it
    starts = state._starts if state.start is None else state.start
    batch = None if tensors else state.batch
    return tensors, (len(state._incoming), starts, names, batch, state._tokens_per_slot)


def _flatten_with_keys(state: MemoryState) -> tuple[list[tuple], tuple]:
    tensors, context = _flatten(state)
    names = [f"bank{index}" for index in range(context[0])] + [f"cache.{n}" for n in context[2]]
    keys = map(pytree.MappingKey, names)
    return list(zip(keys, tensors, strict=True)), context


def _unflatten(tensors: Iterable[Tensor], context: tuple) -> MemoryState:
    tensors, (banks, starts, names, batch, tokens_per_slot) = list(tensors), context
    batch = tensors[0].shape[0] if batch is None else batch
    cache = dict(zip(names, tensors[banks:], strict=True))
    if isinstance(starts, int):
        starts = [starts] * batch if starts > 0 else None
    return MemoryState._make(tensors[:banks], starts, cache, batch, tokens_per_slot=tokens_per_slot)


def _read_context(context: Sequence) -> tuple:
    banks, starts, names, batch, tokens_per_slot = context
    starts = starts if isinstance(starts, int) else tuple(starts)
    return banks, starts, tuple(names), batch, tokens_per_slot


pytree.register_pytree_node(
    MemoryState,
    _flatten,
    _unflatten,
    serialized_type_name=_FORMAT,
    to_dumpable_context=list,
    from_dumpable_context=_read_context,
    flatten_with_keys_fn=_flatten_with_keys,
)
# what a file of torch.save may hold that is read with weights_only=True
torch.serialization.add_safe_globals([MemoryState, _Stream])


def _rows_name(index: int) -> str:
    """Where the cache keeps what a segment has written to a bank so far."""
    return f"bank{index}"
