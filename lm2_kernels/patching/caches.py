"""What a host's key/value cache carries for an added memory, in this process and on disk."""

import copy
import dataclasses
import functools
import json
import weakref
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lm2_kernels.state.files import replace_file
from lm2_kernels.state.memory import MemoryState

# the attribute of a cache that holds what it carries
KEPT = "_lm2_kept"
_FORMAT = "lm2_kernels.cache"
# what a layer of a cache may hold beside keys and values, as it is made anew
_CONSTANTS = ("_sliding_window_tensor",)


@dataclasses.dataclass
class Kept:
    """What a key/value cache carries for us."""

    owner: int | None  # whose memory; None, after unpickling: of those with the same weights
    states: dict[int, MemoryState]
    num_columns: int  # tokens read, padding included
    length: int  # what the cache called its length then
    print: str | None = None  # of the owner's weights, where the owner is elsewhere


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
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce__(self):
        # the class was made here: by its name pickle would find the one it was made from
        state, kept = self.__dict__.copy(), self.__dict__[KEPT]
        state[KEPT] = dataclasses.replace(kept, owner=None, print=_print_of(kept))
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


def _print_of(kept: Kept) -> str | None:
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


def write(path: str | Path, cache: object, fingerprint: str) -> None:
    """Write a cache and what it carries as one safetensors file."""
    from safetensors.torch import save_file  # noqa: PLC0415 - computing needs torch alone

    kept: Kept = getattr(cache, KEPT)
    tensors, lengths = {}, []
    for index, (key, value) in enumerate(_keys_and_values(cache)):
        lengths.append(0 if key is None else int(cache.get_seq_length(index)))
        if key is not None:
            tensors |= {f"key.{index}": key, f"value.{index}": value}
    state = _joined(list(kept.states.values()))
    tensors |= {f"memory.{name}": tensor for name, tensor in state.to_tensors().items()}
    # one copy each: they may share their memory
    copies = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    numbers = {"lengths": lengths, "columns": kept.num_columns, "length": kept.length}
    notes = {"format": _FORMAT, "fingerprint": fingerprint, "numbers": json.dumps(numbers)}
    replace_file(path, lambda part: save_file(copies, part, metadata=notes))


def read(
    path: str | Path, cache: object, fingerprint: str, device: torch.device | str
) -> tuple[MemoryState, int]:
    """Fill an empty cache with what :func:`write` wrote. Returns the blocks' states as one, and the
    columns read.

    Raises:
        ValueError: the file is damaged, holds something else, or is of another model.
        NotImplementedError: the cache is not of the kind that was saved.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - as above

    if int(cache.get_seq_length()) != 0:
        raise ValueError("load_cache: the cache must be empty, as DynamicCache() makes it")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            # copies: products may round by where a tensor lies, and in the file it lies anywhere
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            notes = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"load_cache: {path} is not a safetensors file: {error}") from None
    prefix = "memory."
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    state = MemoryState.from_tensors(own)
    if notes.get("format") != _FORMAT or state is None:
        raise ValueError(f"load_cache: {path} holds no cache with a memory")
    if notes["fingerprint"] != fingerprint:
        raise ValueError(
            f"load_cache: {path} was written by a memory with other weights: what it holds is not "
            f"what this model would have read"
        )
    numbers = json.loads(notes["numbers"])
    for index, length in enumerate(numbers["lengths"]):
        if length == 0:
            continue
        key, value = tensors[f"key.{index}"], tensors[f"value.{index}"]
        if key.shape[0] != state.batch:
            raise ValueError(f"load_cache: {path} holds no cache with a memory")
        cache.update(key, value, index)
        layer = cache.layers[index] if hasattr(cache, "layers") else None
        if isinstance(getattr(layer, "cumulative_length", None), int):
            # of a window, which no longer holds all its tokens
            layer.cumulative_length = length
        if int(cache.get_seq_length(index)) != length:
            raise NotImplementedError(
                f"load_cache: a {type(cache).__name__} made like this cannot take the file's "
                f"{length} tokens of layer {index}; make it as the saved one was made, "
                f"DynamicCache(config=model.config) if that was"
            )
    return state, numbers["columns"]


def _keys_and_values(cache: object) -> list[tuple[Tensor | None, Tensor | None]]:
    """Each layer's, (B, heads, tokens, width); None where it holds nothing."""
    if hasattr(cache, "layers"):
        for index, layer in enumerate(cache.layers):
            others = [n for n, v in vars(layer).items() if isinstance(v, Tensor)]
            others = sorted(set(others) - {"keys", "values", *_CONSTANTS})
            if others or not hasattr(layer, "keys"):
                raise _unsaved(cache, f"layer {index} is a {type(layer).__name__}")
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
    elif hasattr(cache, "key_cache"):
        # before transformers 4.56
        pairs = list(zip(cache.key_cache, cache.value_cache, strict=True))
    else:
        raise _unsaved(cache, "it has neither layers nor key_cache")
    pairs = [(k, v) if isinstance(k, Tensor) and k.numel() else (None, None) for k, v in pairs]
    for index, (key, _) in enumerate(pairs):
        layer = cache.layers[index] if hasattr(cache, "layers") else None
        is_window = isinstance(getattr(layer, "cumulative_length", None), int)
        if key is not None and not is_window and key.shape[-2] != cache.get_seq_length(index):
            raise _unsaved(cache, f"layer {index} does not hold one entry a token")
    return pairs


def _unsaved(cache: object, why: str) -> NotImplementedError:
    return NotImplementedError(
        f"save_cache: takes a DynamicCache, not this {type(cache).__name__}: {why}"
    )


def _joined(states: list[MemoryState]) -> MemoryState:
    """The states of several blocks, which stand at one place, as one of several banks."""
    banks, cache = [], {}
    for index, state in enumerate(states):
        banks += state._incoming
        for name, tensor in state._cache.items():
            cache[f"bank{index}" if name == "bank0" else f"{index}.{name}"] = tensor
    return MemoryState._make(banks, states[0]._starts, cache, states[0].batch)


def parted(state: MemoryState) -> list[MemoryState]:
    """The states of which :func:`write` made one."""
    states = []
    for index, bank in enumerate(state._incoming):
        cache = {}
        for name, tensor in state._cache.items():
            number, _, rest = name.partition(".")
            if name == f"bank{index}":
                cache["bank0"] = tensor
            elif number == str(index):
                cache[rest] = tensor
        states.append(MemoryState._make([bank], state._starts, cache, state.batch))
    return states
