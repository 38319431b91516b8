"""The state of an added memory: it follows the host's passes and its key/value cache."""

import dataclasses
import functools
import inspect
import itertools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lm2_kernels.functional import initial_memory
from lm2_kernels.layers.base import ordinary_parameter
from lm2_kernels.layers.paper import PaperMemory
from lm2_kernels.layers.release import ReleaseMemory
from lm2_kernels.patching.adapters import warn_of_frozen
from lm2_kernels.patching.hosts import Host, real_tokens, refuse_packed
from lm2_kernels.state.memory import MemoryState, SegmentCache
from lm2_kernels.state.segments import compress, gather, run_segments, spread

# the attribute of a decoder that holds its AddedMemory, and of a cache that holds its states
MEMORY = "_lm2_memory"
_KEPT = "_lm2_kept"
_owners = itertools.count()


@dataclasses.dataclass(eq=False)
class _Pass:
    """What a forward pass of the host starts from. Blocks recomputed in backward read it again."""

    states: dict[int, MemoryState]  # of each block, before the pass
    order: Tensor | None  # (B, L), see compress; None where all tokens are real
    lengths: list[int] | None
    real: Tensor | None  # (B, L) bool
    keep: bool  # whether the segment may go on after the pass
    is_recorded: bool  # whether backward may recompute blocks
    is_ambiguous: bool = False  # whether another pass cannot be told from this one


@dataclasses.dataclass
class _Kept:
    """What a key/value cache carries for us."""

    owner: int
    states: dict[int, MemoryState]
    num_columns: int  # tokens read, padding included
    length: int  # what the cache called its length then


@functools.cache
def _following(kind: type) -> type:
    """A cache class whose batch operations take the memory along."""

    class Following(kind):
        def reorder_cache(self, beam_idx):
            super().reorder_cache(beam_idx)
            _change_kept(self, lambda state: state.select(beam_idx))

        def batch_select_indices(self, indices):
            super().batch_select_indices(indices)
            _change_kept(self, lambda state: state.select(indices))

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

    Following.__name__, Following.__qualname__ = kind.__name__, kind.__qualname__
    Following.__module__ = kind.__module__
    Following.is_following = True
    return Following


def _change_kept(cache: object, function) -> None:
    kept = getattr(cache, _KEPT)
    states = {index: function(state) for index, state in kept.states.items()}
    setattr(cache, _KEPT, dataclasses.replace(kept, states=states))


class AddedMemory:
    """The state of the memory that :func:`add_memory` gave a model.

    The state follows the host's key/value cache: a call without one, or with an empty one, reads a
    new sequence from the initial memory; a call with a filled one goes on where the call that
    filled it ended. Each cache has a state of its own.

    For documents longer than the host's window, and for truncated backpropagation, set ``carry``: a
    call that would start from the initial memory then starts a new segment with the memory that the
    last call left. It is kept with its history: call :meth:`detach` where gradients are to stop.
    Not with ``generate(use_cache=False)``, whose every step reads the prompt again, as a new call;
    and after a beam search what is carried belongs to the beams: call :meth:`reset`.
    """

    def __init__(self, decoder: nn.Module, blocks: dict[int, nn.Module], host: Host, options: dict):
        self.carry = False
        self.options = options  # of add_memory
        self._blocks = blocks
        self._host = host
        self.frozen: list[nn.Parameter] = []
        self._owner = next(_owners)
        self._names = list(inspect.signature(decoder.forward).parameters)
        self._config = getattr(decoder, "config", None)
        self._carried: dict[int, MemoryState] | None = None
        self._has_warned = False
        self._begin_anew()
        self._handles = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]
        for index, block in blocks.items():
            hook = functools.partial(self._read, index)
            attention = host.attention_of(block)
            self._handles.append(attention.register_forward_hook(hook, with_kwargs=True))

    def _begin_anew(self) -> None:
        self._pass: _Pass | None = None
        self._cache: object | None = None
        self._num_columns = 0
        self._outgoing: dict[int, MemoryState] = {}
        # address of a tensor that each pass makes anew -> the pass; see Host.pass_keys
        self._recorded: weakref.WeakValueDictionary[int, _Pass] = weakref.WeakValueDictionary()

    def __getstate__(self):
        names = ("_pass", "_cache", "_num_columns", "_outgoing", "_recorded")
        state = {name: value for name, value in self.__dict__.items() if name not in names}
        if self._carried is not None:
            state["_carried"] = {index: state.detach() for index, state in self._carried.items()}
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        # a copy has weights of its own: caches that the original filled are not its
        self._owner = next(_owners)
        self._begin_anew()

    def __repr__(self) -> str:
        return f"AddedMemory(blocks {list(self._blocks)}, carry={self.carry}, {self.state})"

    @property
    def layers(self) -> list[PaperMemory | ReleaseMemory]:
        """The memory layers, first block first."""
        return [block.memory for block in self._blocks.values()]

    @property
    def state(self) -> MemoryState | None:
        """With ``carry``, what the next call starts from: a bank (B, N, D) of each block, first
        block first. None is the initial memory.
        """
        if self._carried is None:
            return None
        return MemoryState([state.banks[0] for state in self._carried.values()])

    @state.setter
    def state(self, state: MemoryState | None) -> None:
        if state is not None:
            layers = self.layers
            state.check(len(layers), state.batch, self.options["memory_slots"], layers[0].dim)
            banks = zip(self._blocks, state.banks, strict=True)
            state = {index: MemoryState([bank]) for index, bank in banks}
        self._carried = state

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Forget what was carried, of all batch rows or of some of them."""
        if rows is None or self._carried is None:
            self._carried = None
            return
        self._carried = {
            index: state.end_segment().reset(rows, self._initial(index, 1, state.banks[0].device))
            for index, state in self._carried.items()
        }

    def detach(self) -> None:
        """Cut the carried state's history."""
        if self._carried is not None:
            self._carried = {index: state.detach() for index, state in self._carried.items()}

    def remove(self) -> None:
        """Take the layers and hooks out; what was frozen is trainable again."""
        for handle in self._handles:
            handle.remove()
        for block in self._blocks.values():
            del block.memory
        for parameter in self.frozen:
            parameter.requires_grad_(True)

    def _initial(self, index: int, batch: int, device: torch.device) -> MemoryState:
        block = self._blocks[index]
        layer, like = block.memory, block.memory.any_parameter()
        if like is None:
            # what is left of a quantised block: its norms
            like = ordinary_parameter(block)
        if like is not None and not like.is_meta:
            # the block's, which may be another than the input's; offloaded weights have none
            device = like.device
        bank = initial_memory(
            1,
            self.options["memory_slots"],
            layer.dim,
            self.options["memory_init"],
            device=device,
            dtype=getattr(like, "dtype", None),
        )
        return MemoryState([bank.expand(batch, -1, -1)])

    def _begin(self, decoder: nn.Module, args: tuple, kwargs: dict):
        """Before the decoder: find out what the pass starts from, and which tokens are real."""
        self._pass, self._outgoing = None, {}
        if getattr(decoder, "_is_replica", False):
            raise RuntimeError(
                "add_memory: nn.DataParallel runs one model in several threads, which cannot share "
                "a memory; use DistributedDataParallel, or one device"
            )
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tokens = named.get("input_ids")
        tokens = named.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return None
        is_training = decoder.training and torch.is_grad_enabled()
        if is_training and not self._has_warned and not torch.compiler.is_compiling():
            self._has_warned = warn_of_frozen(decoder, self.layers)
        batch, length = tokens.shape[:2]
        self._cache = self._host.cache(named)
        kept = self._kept(self._cache)
        self._num_columns = length + (0 if kept is None else kept.num_columns)
        if kept is not None:
            states = kept.states
        elif self.carry and self._carried is not None:
            states = {index: state.end_segment() for index, state in self._carried.items()}
        else:
            states = {index: self._initial(index, batch, tokens.device) for index in self._blocks}
        for state in states.values():
            if state.batch != batch:
                raise ValueError(
                    f"add_memory: the input has {batch} rows, the memory {state.batch}; memory "
                    f"follows a cache's reorder_cache, batch_repeat_interleave and "
                    f"batch_select_indices, and a carried one is reset with reset()"
                )
        mask = named.get("attention_mask")
        real = None if mask is None else real_tokens(mask, batch, length, self._num_columns)
        order = lengths = None
        if real is not None and not real.all():
            order, lengths = compress(real)
        positions = named.get("position_ids")
        if positions is not None:
            refuse_packed(positions, order, lengths)
        use_cache = named.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self._config, "use_cache", False)
        is_recorded = torch.is_grad_enabled()
        self._pass = _Pass(
            states,
            order,
            lengths,
            real,
            keep=self._cache is not None or bool(use_cache),
            is_recorded=is_recorded,
        )
        if positions is not None and is_recorded:
            # not the caller's: Host.pass_keys want a tensor of this pass alone
            return (), {**named, "position_ids": positions.clone()}
        return None

    def _kept(self, cache: object | None) -> _Kept | None:
        """What a cache carries for us, None if it is empty."""
        if cache is None:
            return None
        if isinstance(cache, (tuple, list)):
            raise TypeError(
                "add_memory: past_key_values must be a transformers Cache, which the memory can be "
                "tied to, got a tuple; pass past_key_values=DynamicCache() from the first call on"
            )
        length = int(cache.get_seq_length())
        if length == 0:
            return None
        kept = getattr(cache, _KEPT, None)
        if kept is None or kept.owner != self._owner:
            raise ValueError(
                "add_memory: the cache holds tokens that this memory has not read: it was filled "
                "before the memory was added, or by another model"
            )
        if kept.length != length:
            raise ValueError(
                f"add_memory: the cache holds {length} tokens, but when the memory last read there "
                f"were {kept.length}; it cannot follow what is cut off or put in"
            )
        return kept

    def _read(self, index: int, attention: nn.Module, args: tuple, kwargs: dict, output):
        """After a block's self-attention: the memory reads its output, and adds to it."""
        key = self._host.pass_key(kwargs)
        current = self._pass
        if current is None:
            current = None if key is None else self._recorded.get(key.data_ptr())
            if current is None or current.is_ambiguous:
                raise RuntimeError(
                    "add_memory: a block runs by itself, and not as part of a forward pass whose "
                    "memory is known. If backward recomputes it (gradient checkpointing), use "
                    "use_reentrant=False, and no tensors of position_ids that several passes share"
                )
        elif index in self._outgoing:
            raise RuntimeError(f"add_memory: block {index} ran twice in one forward pass")
        elif current.is_recorded:
            if self.carry and not torch.is_grad_enabled():
                raise RuntimeError(
                    "add_memory: gradients cannot flow through a carried memory under reentrant "
                    "gradient checkpointing; use use_reentrant=False"
                )
            self._record(key, current)
        x = self._host.attended(output)
        layer = self._blocks[index].memory

        def step(piece: Tensor, rows: list[Tensor], cache: SegmentCache):
            read, new_rows = layer(piece, rows[0], cache=cache)
            return read, [new_rows]

        if current.order is None:
            inputs = x
        else:
            order, real = current.order.to(x.device), current.real.to(x.device)[:, :, None]
            # what the host computes at the padding may be NaN, which a factor of 0 lets through
            inputs = gather(x.masked_fill(~real, 0.0), order)
        read, state = run_segments(
            step,
            inputs,
            current.states[index],
            self.options["memory_slots"],
            current.lengths,
            keep=current.keep,
        )
        if current.order is not None:
            read = torch.where(real, spread(read, order, current.lengths), x)
        if self._pass is not None:
            self._outgoing[index] = state
        return self._host.replace_attended(output, read)

    def _record(self, key: Tensor | None, current: _Pass) -> None:
        """Remember the pass as long as the tensor lives, which recomputing a block needs too."""
        if key is None:
            return
        earlier = self._recorded.get(key.data_ptr())
        if earlier is current:
            return
        if earlier is not None:
            earlier.is_ambiguous = current.is_ambiguous = True
        self._recorded[key.data_ptr()] = current
        # no cycle: what a pass starts from does not know what it makes
        key._lm2_pass = current

    def _end(self, decoder: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """After the decoder, also when it raised: hand the states to the cache."""
        current, outgoing, cache = self._pass, self._outgoing, self._cache
        self._pass, self._outgoing, self._cache = None, {}, None
        if current is None or output is None:
            return
        missing = sorted(set(self._blocks) - set(outgoing))
        if missing:
            raise RuntimeError(f"add_memory: the forward pass left out blocks {missing}")
        # in the blocks' order
        states = {index: outgoing[index] for index in self._blocks}
        if self.carry:
            self._carried = states
        if cache is None and current.keep:
            values = output.values() if isinstance(output, dict) else output
            # not the legacy format, a tuple: no state can be tied to it
            cache = next((v for v in values if hasattr(v, "get_seq_length")), None)
        if cache is None:
            return
        if not hasattr(cache, "is_following"):
            cache.__class__ = _following(type(cache))
        length = int(cache.get_seq_length())
        setattr(cache, _KEPT, _Kept(self._owner, states, self._num_columns, length))
