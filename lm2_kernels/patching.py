"""Memory layers in models that others wrote, by patching the instance.

:func:`add_memory` puts a memory layer behind the self-attention of the blocks of a Llama-style
decoder of ``transformers``. A forward hook on ``self_attn`` does it, so the host's code stays as it
is; hooks on the decoder that owns the blocks see each pass begin and end, and tie the memory to the
host's key/value cache. :func:`swap_memory` puts our layer in the place of the released
implementation's. :func:`remove_memory` undoes both. ``transformers`` is never imported.
"""

import dataclasses
import functools
import inspect
import itertools
import json
import re
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lm2_kernels import checkpoint
from lm2_kernels.functional import check_bool, check_int, initial_memory
from lm2_kernels.modules import PaperMemory, ReleaseMemory
from lm2_kernels.state import MemoryState, SegmentCache
from lm2_kernels.streaming import compress, gather, run_segments, spread

__all__ = [
    "AddedMemory",
    "Report",
    "add_memory",
    "get_memory",
    "load_memory",
    "remove_memory",
    "swap_memory",
]

# the attribute of a decoder that holds its AddedMemory, and of a cache that holds its states
_MEMORY = "_lm2_memory"
_KEPT = "_lm2_kept"
# the attribute of a host's config that save_pretrained writes for load_memory
_OPTIONS = "lm2_memory"
_CACHE_NAMES = ("cache", "past_key_values")
_owners = itertools.count()


@dataclasses.dataclass
class Report:
    """What a call changed; print it."""

    action: str  # "added", "swapped", "removed" or "loaded"
    modules: list[str]  # names of the memory layers
    parameters: int  # of the memory layers
    total: int  # of the model, memory layers included
    trainable: int  # that require gradients
    memory: "AddedMemory | None"  # of add_memory: the state between calls
    _model: nn.Module = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return (
            f"{len(self.modules)} memory layers {self.action}: {', '.join(self.modules)}\n"
            f"{self.parameters:,} parameters in them; the model has {self.total:,}, of which "
            f"{self.trainable:,} are trainable"
        )

    def parameter_groups(
        self, lr: float, *, weight_decay: float = 0.0, backbone_lr: float | None = None
    ) -> list[dict[str, object]]:
        """Groups for an optimiser, of what requires gradients now.

        Args:
            lr: of the memory layers.
            weight_decay: of matrices; vectors and scalars get none.
            backbone_lr: of all other parameters, if they are not frozen; ``lr`` unless given.
        """
        own = {id(p) for name in self.modules for p in _parameters(self._model, name)}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                key = (id(parameter) in own, parameter.dim() > 1)
                groups.setdefault(key, []).append(parameter)
        other_lr = lr if backbone_lr is None else backbone_lr
        return [
            {
                "params": groups[is_own, is_matrix],
                "lr": lr if is_own else other_lr,
                "weight_decay": weight_decay if is_matrix else 0.0,
            }
            for is_own, is_matrix in sorted(groups, reverse=True)
        ]


def _parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    return list(model.get_submodule(name).parameters())


def _names(model: nn.Module, modules: Sequence[nn.Module]) -> list[str]:
    own = set(modules)
    return [name for name, module in model.named_modules() if module in own]


def _report(
    action: str, model: nn.Module, modules: list[str], memory: "AddedMemory | None" = None
) -> Report:
    own = {id(p): p.numel() for name in modules for p in _parameters(model, name)}
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Report(
        action,
        modules,
        sum(own.values()),
        sum(size for size, _ in sizes),
        sum(size for size, requires_grad in sizes if requires_grad),
        memory,
        model,
    )


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

    def __init__(self, decoder: nn.Module, blocks: dict[int, nn.Module], options: dict):
        self.carry = False
        self.options = options  # of add_memory
        self._blocks = blocks
        self._frozen: list[nn.Parameter] = []
        self._owner = next(_owners)
        self._names = list(inspect.signature(decoder.forward).parameters)
        self._config = getattr(decoder, "config", None)
        self._carried: dict[int, MemoryState] | None = None
        self._begin_anew()
        self._handles = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]
        for index, block in blocks.items():
            hook = functools.partial(self._read, index)
            self._handles.append(block.self_attn.register_forward_hook(hook, with_kwargs=True))

    def _begin_anew(self) -> None:
        self._pass: _Pass | None = None
        self._cache: object | None = None
        self._num_columns = 0
        self._outgoing: dict[int, MemoryState] = {}
        # address of a tensor that each pass makes anew -> the pass; see _key
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
            index: state.end_segment().reset(rows, self._initial(index, 1))
            for index, state in self._carried.items()
        }

    def detach(self) -> None:
        """Cut the carried state's history."""
        if self._carried is not None:
            self._carried = {index: state.detach() for index, state in self._carried.items()}

    def _remove(self) -> None:
        """Take the layers and hooks out; what was frozen is trainable again."""
        for handle in self._handles:
            handle.remove()
        for block in self._blocks.values():
            del block.memory
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def _initial(self, index: int, batch: int) -> MemoryState:
        layer = self._blocks[index].memory
        like = next(layer.parameters())
        bank = initial_memory(
            1,
            self.options["memory_slots"],
            layer.dim,
            self.options["memory_init"],
            device=like.device,
            dtype=like.dtype,
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
        batch, length = tokens.shape[:2]
        caches = (named.get(name) for name in _CACHE_NAMES)
        self._cache = next((cache for cache in caches if cache is not None), None)
        kept = self._kept(self._cache)
        self._num_columns = length + (0 if kept is None else kept.num_columns)
        if kept is not None:
            states = kept.states
        elif self.carry and self._carried is not None:
            states = {index: state.end_segment() for index, state in self._carried.items()}
        else:
            states = {index: self._initial(index, batch) for index in self._blocks}
        for state in states.values():
            if state.batch != batch:
                raise ValueError(
                    f"add_memory: the input has {batch} rows, the memory {state.batch}; memory "
                    f"follows a cache's reorder_cache, batch_repeat_interleave and "
                    f"batch_select_indices, and a carried one is reset with reset()"
                )
        mask = named.get("attention_mask")
        real = None if mask is None else _real_tokens(mask, batch, length, self._num_columns)
        order = lengths = None
        if real is not None and not real.all():
            order, lengths = compress(real)
        positions = named.get("position_ids")
        if positions is not None:
            _refuse_packed(positions, order, lengths)
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
            # not the caller's: _key wants a tensor of this pass alone
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
        key = _key(kwargs)
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
        x = output[0] if isinstance(output, tuple) else output
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
        return (read, *output[1:]) if isinstance(output, tuple) else read

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


def _key(kwargs: dict) -> Tensor | None:
    """Of a self-attention's arguments, a tensor that each pass of the decoder makes anew, and that
    recomputing a block gets again: its address tells which pass that belongs to.
    """
    value = kwargs.get("position_embeddings")
    while isinstance(value, (tuple, list)):
        value = value[0]
    value = kwargs.get("position_ids") if value is None else value
    return value if isinstance(value, Tensor) else None


def _real_tokens(mask: object, batch: int, length: int, num_columns: int) -> Tensor:
    """Which of the pass's L tokens are real, from any mask of transformers: (B, L) bool."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
        if mask is None:
            return torch.ones(batch, length, dtype=torch.bool)
    start = num_columns - length
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        what = mask.dim() if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"add_memory: attention_mask must be a 2-D or 4-D tensor, got {what}")
    if mask.shape[0] not in (1, batch) or mask.shape[-1] < num_columns:
        raise ValueError(
            f"add_memory: attention_mask must be ({batch}, {num_columns}), cached tokens included, "
            f"got {tuple(mask.shape)}"
        )
    if mask.dim() == 2:
        return mask[:, start:num_columns].bool().expand(batch, length)
    # 4-D: bool, True = visible, or added to the scores
    visible = mask if mask.dtype == torch.bool else mask == 0
    visible = visible[:, 0, :, start:num_columns].expand(batch, length, length)
    real = visible[:, -1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    is_plain = (visible == causal & real[:, None]).all(-1)
    # for some kernels, tokens that would see nothing see everything
    is_plain |= visible.all(-1) & ~real
    if not is_plain.all():
        raise ValueError(
            "add_memory: a 4-D attention_mask must be causal with padding and nothing else: the "
            "memory would mix what a mask of packed sequences, or a window, keeps apart; pass a "
            "2-D mask"
        )
    return real


def _refuse_packed(positions: Tensor, order: Tensor | None, lengths: list[int] | None) -> None:
    """Raise ValueError if a row's positions start anew: several sequences in one row."""
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] < 2:
        return
    ascends = None
    if order is not None:
        positions = gather(positions.expand_as(order), order)
        ends = torch.tensor(lengths, device=positions.device)[:, None]
        ascends = torch.arange(1, positions.shape[1], device=positions.device) >= ends
    is_later = positions[:, 1:] > positions[:, :-1]
    if not (is_later if ascends is None else is_later | ascends).all():
        raise ValueError(
            "add_memory: position_ids must ascend along each row: several sequences packed into "
            "one row would share its memory; give each a row, padded, with a 2-D attention_mask"
        )


def _is_block(module: nn.Module) -> bool:
    attention = getattr(module, "self_attn", None)
    return (
        isinstance(attention, nn.Module)
        and any(hasattr(attention, name) for name in ("q_proj", "qkv_proj", "q_a_proj"))
        and hasattr(getattr(attention, "o_proj", None), "out_features")
        and any(hasattr(module, name) for name in ("mlp", "block_sparse_moe", "feed_forward"))
    )


def _find_blocks(model: nn.Module) -> tuple[str, nn.Module, nn.ModuleList]:
    """The name of the list of blocks, the decoder that owns it, and the list."""
    found = []
    for name, module in model.named_modules():
        for child_name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and any(map(_is_block, child)):
                found.append((f"{name}.{child_name}".lstrip("."), module, child))
    if not found:
        raise ValueError(
            f"add_memory: {type(model).__name__} has no list of decoder blocks: looked for an "
            f"nn.ModuleList of modules that have a self_attn (with q_proj or qkv_proj, and o_proj) "
            f"and an mlp"
        )
    if len(found) > 1:
        raise ValueError(
            f"add_memory: {type(model).__name__} has several lists of blocks, "
            f"{[name for name, _, _ in found]}; pass the submodule that owns the one you mean"
        )
    names = inspect.signature(found[0][1].forward).parameters
    if "attention_mask" not in names or not any(name in names for name in _CACHE_NAMES):
        raise ValueError(
            f"add_memory: the forward of {type(found[0][1]).__name__}, which owns the blocks, must "
            f"take attention_mask and past_key_values, got {list(names)}"
        )
    return found[0]


class _Repeated(nn.ModuleList):
    """One module, iterated several times. transformers saves no module that has two names."""

    def __init__(self, module: nn.Module, times: int):
        super().__init__([module])
        self.times = times

    def __iter__(self) -> Iterator[nn.Module]:
        return itertools.repeat(self[0], self.times)


class _AddedRelease(ReleaseMemory):
    def __init__(self, dim: int, num_heads: int, **options):
        super().__init__(dim, num_heads, pooled_gate="prefix", **options)
        self.attention_mlp = _Repeated(self.attention_mlp[0], len(self.attention_mlp))


def add_memory(
    model: nn.Module,
    *,
    memory_slots: int = 2048,
    num_heads: int = 8,
    layers: Sequence[int] | None = None,
    formulation: str = "paper",
    memory_init: str | None = None,
    zero_init: bool = True,
    freeze: bool = True,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Report:
    """Give a Llama-style model of ``transformers`` a memory, in place.

    A memory layer acts on a block's self-attention output, before that is added to the residual
    stream, and is the block's submodule ``memory``: ``state_dict``, ``to`` and optimisers see it.
    The blocks are found by their structure, whatever the model's class. Each block has a bank of
    its own, carried from segment to segment of ``memory_slots`` tokens (``flow="time"``;
    ``"depth"`` is impossible, as the host runs all tokens through a block before the next one).
    The host's own attention is unchanged. Padding, wherever ``attention_mask`` has it, is neither
    read nor written.

    The state follows the key/value cache, through ``generate`` and beam search too; see
    :class:`AddedMemory`, which the report has as ``memory``. After ``save_pretrained``, load the
    model without memory and call :func:`load_memory`.

    Args:
        model: any module that holds one list of decoder blocks.
        memory_slots: slots N of each bank, and the tokens of a segment.
        num_heads: heads of the memory attention; must divide the model's width.
        layers: which blocks; None is all that have a self-attention.
        formulation: "paper" (:class:`PaperMemory`) or "release" (:class:`ReleaseMemory` with
            ``pooled_gate="prefix"``).
        memory_init: what a bank starts from, "identity" or "zeros" (release formulation alone, and
            there the default with ``zero_init``).
        zero_init: initialise the layers so that the model computes bit for bit what it computed
            before. The release formulation then learns one bias first, and the rest from sequences
            of several segments.
        freeze: require gradients of the memory layers alone. Gradient checkpointing then needs
            ``use_reentrant=False``, or transformers' ``enable_input_require_grads``.
        dropout: on the memory attention's probabilities, while training.
        backend: of the memory layers; None takes the default (``use_backend``).

    Returns:
        What was added, with parameter groups for an optimiser.

    Raises:
        TypeError, ValueError: nothing matches, there is a memory already, or an option does not
            fit; the model is unchanged.
    """
    if any(hasattr(module, _MEMORY) for module in model.modules()):
        raise ValueError("add_memory: the model has a memory already; see remove_memory")
    check_int("add_memory", "memory_slots", memory_slots, 1)
    check_bool("add_memory", "zero_init", zero_init)
    check_bool("add_memory", "freeze", freeze)
    if formulation not in ("paper", "release"):
        raise ValueError(
            f"add_memory: formulation must be 'paper' or 'release', got {formulation!r}"
        )
    is_paper = formulation == "paper"
    if memory_init is None:
        memory_init = "zeros" if zero_init and not is_paper else "identity"
    if memory_init not in ("identity", "zeros"):
        raise ValueError(
            f"add_memory: memory_init must be 'identity' or 'zeros', got {memory_init!r}"
        )
    if is_paper and memory_init == "zeros":
        raise ValueError(
            "add_memory: memory_init='zeros' is for the release formulation: without biases, what "
            "the paper's reads from zeros and writes back is zeros for ever"
        )
    if zero_init and not is_paper and memory_init != "zeros":
        raise ValueError(
            "add_memory: zero_init of the release formulation needs memory_init='zeros': its "
            "output is x plus the new memory, to which the old one contributes"
        )
    list_name, decoder, blocks = _find_blocks(model)
    if layers is None:
        layers = [index for index, block in enumerate(blocks) if _is_block(block)]
    layers = list(layers)
    for index in layers:
        check_int("add_memory", "layers", index, 0)
        if index >= len(blocks) or not _is_block(blocks[index]):
            raise ValueError(
                f"add_memory: layers has {index}, but {list_name} has {len(blocks)} blocks, and "
                f"with a self-attention: {[i for i, b in enumerate(blocks) if _is_block(b)]}"
            )
        if hasattr(blocks[index], "memory"):
            raise ValueError(f"add_memory: {list_name}.{index} has an attribute 'memory' already")
    if (
        not layers
        or layers != sorted(set(layers))
        or len({blocks[i] for i in layers}) < len(layers)
    ):
        raise ValueError(f"add_memory: layers must ascend, without repeats, got {layers}")

    new = []
    for index in layers:
        block = blocks[index]
        like = next(p for p in block.parameters() if p.is_floating_point() and p.itemsize > 1)
        kind = PaperMemory if is_paper else _AddedRelease
        layer = kind(
            block.self_attn.o_proj.out_features,
            num_heads,
            dropout=dropout,
            backend=backend,
            device=like.device,
            dtype=like.dtype,
        )
        if zero_init:
            nn.init.zeros_(
                (layer.value_proj if is_paper else layer.attended_memory_layernorm2).weight
            )
        new.append(layer.train(block.training))

    options = {
        "memory_slots": memory_slots,
        "num_heads": num_heads,
        "layers": layers,
        "formulation": formulation,
        "memory_init": memory_init,
        "zero_init": zero_init,
        "dropout": dropout,
    }
    memory = AddedMemory(decoder, {index: blocks[index] for index in layers}, options)
    if freeze:
        memory._frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in memory._frozen:
        parameter.requires_grad_(False)
    for index, layer in zip(layers, new, strict=True):
        blocks[index].memory = layer
    setattr(decoder, _MEMORY, memory)
    if hasattr(model, "config"):
        setattr(model.config, _OPTIONS, options)
    return _report("added", model, _names(model, memory.layers), memory)


def get_memory(model: nn.Module) -> AddedMemory:
    """The memory that :func:`add_memory` gave a model; ValueError if there is none."""
    for module in model.modules():
        if hasattr(module, _MEMORY):
            return getattr(module, _MEMORY)
    raise ValueError(f"get_memory: {type(model).__name__} has no added memory; see add_memory")


def load_memory(
    model: nn.Module, folder: str | Path, *, freeze: bool = True, backend: str | None = None
) -> Report:
    """Give a model the memory that a model had when ``save_pretrained`` wrote it to a folder.

    Args:
        model: the host, as ``from_pretrained`` of the same folder makes it.
        folder: has ``config.json`` and safetensors files.
        freeze: as of :func:`add_memory`.
        backend: as of :func:`add_memory`.

    Raises:
        OSError: there is no such file.
        ValueError: there is no memory in the folder, it does not fit, or weights are missing.
    """
    from safetensors import safe_open  # noqa: PLC0415 - computing needs torch alone

    folder = Path(folder)
    options = json.loads((folder / checkpoint.CONFIG).read_text(encoding="utf-8")).get(_OPTIONS)
    if options is None:
        raise ValueError(f"load_memory: {folder / checkpoint.CONFIG} has no '{_OPTIONS}'")
    saved: dict[int, dict[str, Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                match = re.search(r"(\d+)\.memory\.(.+)$", name)
                if match:
                    saved.setdefault(int(match[1]), {})[match[2]] = tensors.get_tensor(name)
    report = add_memory(model, **options, freeze=freeze, backend=backend)
    try:
        for index, layer in zip(options["layers"], report.memory.layers, strict=True):
            layer.load_state_dict(saved.get(index, {}))
    except RuntimeError as error:
        remove_memory(model)
        raise ValueError(f"load_memory: block {index} in {folder} does not fit: {error}") from None
    return dataclasses.replace(report, action="loaded")


def remove_memory(model: nn.Module) -> Report:
    """Undo :func:`add_memory` and :func:`swap_memory`: the model is as it was before.

    Raises:
        ValueError: there is nothing to remove.
    """
    added = [module for module in model.modules() if hasattr(module, _MEMORY)]
    layers = [layer for module in added for layer in getattr(module, _MEMORY).layers]
    swapped = [module for module in model.modules() if isinstance(module, _SwappedMemory)]
    if not layers and not swapped:
        raise ValueError(
            f"remove_memory: {type(model).__name__} has no memory of add_memory or swap_memory"
        )
    before = _report("removed", model, _names(model, [*layers, *swapped]))
    for module in added:
        getattr(module, _MEMORY)._remove()
        delattr(module, _MEMORY)
    if added and hasattr(getattr(model, "config", None), _OPTIONS):
        delattr(model.config, _OPTIONS)
    for module in swapped:
        # the same, unless something put others in their places
        _share_parameters(module, module.released[0])
        module.released[0].train(module.training)
    _replace(model, {id(module): module.released[0] for module in swapped})
    after = _report("removed", model, [])
    return dataclasses.replace(after, modules=before.modules, parameters=before.parameters)


# what a memory module of the released implementation has
_RELEASED = (
    "query_proj",
    "key_proj",
    "value_proj",
    "attention_mlp",
    "attended_memory_layernorm",
    "attended_memory_layernorm2",
    "input_gate_projector",
    "memory_gate_projector",
    "input_bias",
    "forget_bias",
)


class _SwappedMemory(ReleaseMemory):
    """:class:`ReleaseMemory` with the released module's call."""

    def forward(
        self,
        inputs: Tensor,  # (B, T, D)
        memory: Tensor,  # (B, N, D)
        attention_mask: Tensor | None = None,  # broadcasts to (B, H, T, N)
    ) -> tuple[Tensor, Tensor]:
        """The output (B, T, D) and the new memory (B, N, D).

        ``attention_mask`` is nonzero where a token does not see a slot. Slots of later tokens are
        hidden anyway; of the others each must be hidden from all tokens or from none.
        """
        slot_mask = None
        if attention_mask is not None:
            shape = (inputs.shape[0], self.num_heads, inputs.shape[1], memory.shape[1])
            hidden = attention_mask.bool().broadcast_to(shape)
            of_last = hidden[:, 0, -1]
            causal = torch.ones(shape[2:], dtype=torch.bool, device=hidden.device).tril()
            if ((hidden != of_last[:, None, None]) & causal).any():
                raise ValueError(
                    "swap_memory: attention_mask must hide a slot from all tokens or from none, "
                    "and hide nothing else but the slots of later tokens"
                )
            slot_mask = ~of_last
        return super().forward(inputs.flatten(2), memory, slot_mask=slot_mask)


def _released_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        is_ours = isinstance(module, ReleaseMemory)
        if not is_ours and all(hasattr(module, attribute) for attribute in _RELEASED):
            yield name, module


def _replace(model: nn.Module, new: dict[int, nn.Module]) -> None:
    """Put modules in the places of others, wherever these are registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[name] = new[id(child)]


def swap_memory(model: nn.Module, *, backend: str | None = None) -> Report:
    """Replace every memory module of the released implementation by ours, in place.

    They are found by their parts, whatever their class. Ours takes the same arguments, returns the
    same, and holds the same ``Parameter`` objects under the same names: optimisers and checkpoints
    go on. It computes the same to rounding, but where a token sees no slot: 0 instead of NaN.

    Args:
        model: holds the modules.
        backend: of our layers; None takes the default (``use_backend``).

    Raises:
        ValueError: there is no such module, or one has an option that ours lacks; the model is
            unchanged.
    """
    found = dict(_released_modules(model))
    if not found:
        raise ValueError(
            f"swap_memory: {type(model).__name__} has no memory module of the released "
            f"implementation (or no more): looked for a module with {', '.join(_RELEASED)}"
        )
    if "" in found:
        raise ValueError(
            "swap_memory: the model itself is a memory module, which cannot be replaced in place; "
            "use ReleaseMemory with its state dict"
        )
    new = {id(module): _swapped(name, module, backend) for name, module in found.items()}
    for module in new.values():
        module._pack()
    _replace(model, new)
    return _report("swapped", model, list(found))


def _all_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Each under all its names."""
    return module.named_parameters(remove_duplicate=False)


def _share_parameters(source: nn.Module, target: nn.Module) -> None:
    """Put one module's parameters in the places of another's, which have the same names."""
    for name, parameter in list(_all_parameters(source)):
        prefix, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(prefix), leaf, parameter)


def _swapped(name: str, module: nn.Module, backend: str | None) -> _SwappedMemory:
    """Ours for a released module, with its parameters, or ValueError."""

    def refuse(why: str) -> ValueError:
        return ValueError(f"swap_memory: {name} {why}, which ReleaseMemory does not reproduce")

    for option in ("n_heads", "num_blocks", "use_topk", "topk", "attn_drop"):
        if not hasattr(module, option):
            raise refuse(f"has no attribute {option!r}")
    norms = (module.attended_memory_layernorm, module.attended_memory_layernorm2)
    if len(set(module.attention_mlp)) != 1:
        raise refuse("has an attention_mlp of several Linear layers instead of one shared")
    if norms[0].eps != norms[1].eps:
        raise refuse("has two values of epsilon in its layer norms")
    if module.use_topk and module.attn_drop.p > 0.0:
        raise refuse("drops out before top-k (set attn_drop.p to 0)")
    for part in module.modules():
        hooks = (part._forward_hooks, part._forward_pre_hooks)
        if any((*hooks, part._backward_hooks, part._backward_pre_hooks)):
            raise refuse("has hooks")
    swapped = _SwappedMemory(
        module.query_proj.in_features,
        module.n_heads,
        num_blocks=module.num_blocks,
        attention_mlp_layers=len(module.attention_mlp),
        top_k=module.topk if module.use_topk else None,
        dropout=module.attn_drop.p,
        eps=norms[0].eps,
        backend=backend,
        device="meta",
    )
    wanted, got = ({n: p.shape for n, p in _all_parameters(m)} for m in (swapped, module))
    if wanted != got:
        raise refuse(f"has other parameters: {sorted(set(wanted.items()) ^ set(got.items()))}")
    _share_parameters(module, swapped)
    # optimisers number the parameters in the order in which a model lists them
    for own, theirs in (
        (swapped._parameters, module._parameters),
        (swapped._modules, module._modules),
    ):
        for key in [key for key in theirs if key in own]:
            own[key] = own.pop(key)
    # in a tuple: not a submodule
    swapped.released = (module,)
    return swapped.train(module.training)
