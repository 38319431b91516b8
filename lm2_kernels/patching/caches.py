"""What a host's key/value cache carries for an added memory, in this process and on disk."""

import copy
import dataclasses
import functools
import json
import pickle
import weakref
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lm2_kernels.state.files import read_state, write_state
from lm2_kernels.state.memory import MemoryState, join_banks

# the attribute of a cache that holds what it carries
KEPT = "_lm2_kept"
_FORMAT = "lm2_kernels.cache"
# the cache that can be saved, and what its layers may be, where it has any
_CACHE = "DynamicCache"
_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer"}


@dataclasses.dataclass
class Kept:
    """What a key/value cache carries for us."""

    owner: int | None  # whose memory; None after unpickling
    states: dict[int, MemoryState]
    num_columns: int  # tokens read, padding included
    length: int  # what the cache called its length then
    print: str | None = None  # of the owner's weights, if they were asked for


class Following:
    """Mixed into a cache's class: its batch operations take the memory along."""

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        rows = _numbers(beam_idx)
        _change_kept(self, lambda state: state.select(rows))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        rows = _numbers(indices)
        _change_kept(self, lambda state: state.select(rows))

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        _change_kept(self, lambda state: state.expand(repeats))

    def crop(self, *args, **kwargs):
        before = int(self.get_seq_length())
        super().crop(*args, **kwargs)
        if int(self.get_seq_length()) != before:
            raise NotImplementedError(
                "add_memory: the cache was cropped, but the memory cannot forget single "
                "tokens; assisted decoding and the like do not work with an added memory"
            )

    def __deepcopy__(self, memo):
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        # it may go on with a copy of its model when the original is gone
        kept = self.__dict__[KEPT]
        kept = dataclasses.replace(kept, print=print_of(kept))
        copied.__dict__.update(copy.deepcopy({**self.__dict__, KEPT: kept}, memo))
        return copied

    def __reduce__(self):
        # the class was made here: by its name pickle would find the one it was made from
        state, kept = self.__dict__.copy(), self.__dict__[KEPT]
        own = print_of(kept)
        if own is None:
            raise pickle.PicklingError(
                "add_memory: the model that filled this cache is gone, and with it what tells "
                "whose cache it is; pickle or copy a cache while its model lives"
            )
        state[KEPT] = dataclasses.replace(kept, owner=None, print=own)
        return _made, (type(self).__mro__[2], state)


def _numbers(rows: Tensor) -> list:
    # once, and not for each block: a device is waited for
    return rows.tolist() if isinstance(rows, Tensor) else rows


@functools.cache
def _following(kind: type) -> type:
    """A cache class whose batch operations take the memory along."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (Following, kind), names)


def _made(kind: type, state: dict) -> object:
    """A cache, unpickled."""
    following = _following(kind)
    cache = following.__new__(following)
    cache.__dict__.update(state)
    return cache


# what a file of torch.save may hold that is read with weights_only=True, if its user adds
# transformers' own
torch.serialization.add_safe_globals([Kept, _made])


class _Memory(Protocol):
    """What is asked of an added memory."""

    def fingerprint(self) -> str: ...


# the memories that live, by their numbers
memories: weakref.WeakValueDictionary[int, _Memory] = weakref.WeakValueDictionary()
# of those that were taken out of their models, the fingerprints
_removed: dict[int, str] = {}


def retire(owner: int, fingerprint: str) -> None:
    """Of a memory that is taken out of its model: remember whose its caches are."""
    memories.pop(owner, None)
    _removed[owner] = fingerprint


def print_of(kept: Kept) -> str | None:
    """The fingerprint of what filled a cache; None if that is gone, and nobody asked before."""
    if kept.owner in _removed:
        return _removed[kept.owner]
    owner = None if kept.owner is None else memories.get(kept.owner)
    return kept.print if owner is None else owner.fingerprint()


def _change_kept(cache: object, function) -> None:
    kept = getattr(cache, KEPT)
    states = {index: function(state) for index, state in kept.states.items()}
    setattr(cache, KEPT, dataclasses.replace(kept, states=states))


def follow(cache: object) -> None:
    """Let a cache's batch operations take the memory along from now on."""
    if not isinstance(cache, Following):
        cache.__class__ = _following(type(cache))


def write(path: str | Path, cache: object, kept: Kept, fingerprint: str) -> None:
    """Write a cache and what it carries as one safetensors file."""
    tensors, lengths = {}, []
    for index, (key, value) in enumerate(_keys_and_values(cache)):
        lengths.append(0 if key is None else int(cache.get_seq_length(index)))
        if key is not None:
            tensors |= {f"key.{index}": key, f"value.{index}": value}
    state = join_banks(list(kept.states.values()))
    tensors |= {f"memory.{name}": tensor for name, tensor in state.to_tensors().items()}
    numbers = {"lengths": lengths, "columns": kept.num_columns}
    notes = {"format": _FORMAT, "fingerprint": fingerprint, "numbers": json.dumps(numbers)}
    write_state(path, tensors, notes)


@dataclasses.dataclass
class Saved:
    """What :func:`write` wrote."""

    pairs: dict[int, tuple[Tensor, Tensor]]  # keys and values of the layers that hold any
    lengths: list[int]  # the tokens of each layer
    state: MemoryState  # the blocks' states as one
    num_columns: int


def read(path: str | Path, fingerprint: str, device: torch.device | str) -> Saved:
    """Read what :func:`write` wrote.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged, holds something else, or is of another model.
    """
    try:
        tensors, notes = read_state(path, device)
    except ValueError as error:
        raise ValueError(f"load_cache: {error}") from None
    prefix = "memory."
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    state = MemoryState.from_tensors(own)
    damaged = ValueError(f"load_cache: {path} holds no cache with a memory")
    if notes.get("format") != _FORMAT or state is None:
        raise damaged
    if notes["fingerprint"] != fingerprint:
        raise ValueError(
            f"load_cache: {path} was written by a model with other weights, or with another "
            f"adapter or another rule of writing: what it holds is not what this model would have "
            f"read"
        )
    numbers, pairs = json.loads(notes["numbers"]), {}
    for index, length in enumerate(numbers["lengths"]):
        pair = tensors.get(f"key.{index}"), tensors.get(f"value.{index}")
        if any((length > 0) != (t is not None and len(t) == state.batch) for t in pair):
            raise damaged
        if length > 0:
            pairs[index] = pair
    return Saved(pairs, numbers["lengths"], state, numbers["columns"])


def check_empty(cache: object) -> None:
    """Raise unless a cache is one that :func:`fill` can fill."""
    _check_kind("load_cache", cache)
    if int(cache.get_seq_length()) != 0:
        raise ValueError("load_cache: the cache must be empty, as DynamicCache() makes it")


def fill(cache: object, saved: Saved) -> None:
    """Fill an empty cache with keys and values; if it cannot take them it stays empty.

    Raises:
        NotImplementedError: the cache was made in another way than the one that was saved.
    """
    layers = list(getattr(cache, "layers", []))
    # which one made from a config does not
    may_grow = getattr(cache, "layer_class_to_replicate", "any") is not None
    for index, (key, _) in saved.pairs.items():
        length = saved.lengths[index]
        window = getattr(layers[index], "sliding_window", None) if index < len(layers) else None
        # one token less than the window's, as the next one is in it too
        needed = length if window is None else min(length, window - 1)
        if key.shape[-2] < needed or (index >= len(layers) and not may_grow):
            raise NotImplementedError(
                f"load_cache: a {type(cache).__name__} made like this cannot take the file's "
                f"{length} tokens of layer {index}; make it as the saved one was made, "
                f"DynamicCache(config=model.config) if that was"
            )
    for index, (key, value) in saved.pairs.items():
        cache.update(key, value, index)
        if getattr(cache, "layers", None) and hasattr(cache.layers[index], "cumulative_length"):
            # of a window, which no longer holds all its tokens
            cache.layers[index].cumulative_length = saved.lengths[index]


def _check_kind(what: str, cache: object) -> None:
    """Raise NotImplementedError unless a cache holds keys and values alone, as far as we know."""
    # by their names, as transformers is not imported; what is made from them may hold more
    others = {type(layer).__name__ for layer in getattr(cache, "layers", [])} - _LAYERS
    if type(cache).__name__ != _CACHE or others:
        whose = f" whose layers are {', '.join(sorted(others))}" if others else ""
        raise NotImplementedError(
            f"{what}: takes a {_CACHE}, not this {type(cache).__name__}{whose}: it may hold more "
            f"than keys and values"
        )


def _keys_and_values(cache: object) -> list[tuple[Tensor | None, Tensor | None]]:
    """Each layer's, (B, heads, tokens, width); None where it holds nothing."""
    _check_kind("save_cache", cache)
    if hasattr(cache, "layers"):
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
    else:
        # before transformers 4.54
        pairs = list(zip(cache.key_cache, cache.value_cache, strict=True))
    return [(k, v) if isinstance(k, Tensor) and k.numel() else (None, None) for k, v in pairs]
