"""The state of an added memory: it follows the host's passes and its key/value cache."""

import dataclasses
import functools
import inspect
import itertools
import sys
import threading
import types
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lm2_kernels.functional import initial_memory
from lm2_kernels.layers.base import ordinary_parameter
from lm2_kernels.layers.paper import PaperMemory
from lm2_kernels.layers.release import ReleaseMemory
from lm2_kernels.patching import caches
from lm2_kernels.patching.adapters import warn_of_frozen
from lm2_kernels.patching.caches import KEPT, Kept, memories
from lm2_kernels.patching.hosts import Host, read_tokens
from lm2_kernels.patching.prints import fingerprint
from lm2_kernels.plain import ORDINARY
from lm2_kernels.state.cache import SegmentCache
from lm2_kernels.state.memory import MemoryState, part_banks
from lm2_kernels.state.segments import Rule, gather, leave_graph, run_segments, spread

# the attribute of a decoder that holds its AddedMemory
MEMORY = "_lm2_memory"
_owners = itertools.count()


@dataclasses.dataclass(eq=False)
class _Pass:
    """What a forward pass of the host starts from. Blocks recomputed in backward read it again."""

    states: dict[int, MemoryState]  # of each block, before the pass
    tokens: tuple[Tensor, Tensor, list[int]] | None  # see read_tokens
    keep: bool  # whether the segment may go on after the pass
    is_recorded: bool  # whether backward may recompute blocks
    is_ambiguous: bool = False  # whether another pass cannot be told from this one


@dataclasses.dataclass(eq=False)
class _Call:
    """A forward pass while it runs, in the thread that runs it."""

    outer: "_Call | None"  # the pass within which this one was begun: a hook called the model
    frame: types.FrameType | None  # of torch's call of the decoder
    start: _Pass | None = None  # None: no tokens
    cache: object | None = None
    num_columns: int = 0  # tokens up to the end of the pass, those of the cache included
    outgoing: dict[int, MemoryState] = dataclasses.field(default_factory=dict)
    outputs: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # of blocks; see _Behind
    is_cut: bool = False  # whether a block ran without gradients, though they were wanted


class _Behind(torch.autograd.Function):
    """A bank whose gradient comes to its block behind that of the block's output, if only of 0.

    A sharded block gathers its weights for backward when its output's gradient comes. What is
    carried to another pass leaves the block beside its output.
    """

    @staticmethod
    def forward(bank: Tensor, output: Tensor) -> Tensor:
        return bank.view_as(bank)

    @staticmethod
    def setup_context(ctx, inputs, output):
        like = inputs[1]
        ctx.output = like.shape, like.dtype, like.device

    @staticmethod
    def backward(ctx, dbank):
        shape, dtype, device = ctx.output
        return dbank, torch.zeros((), dtype=dtype, device=device).expand(shape)


class AddedMemory:
    """The state of the memory that :func:`add_memory` gave a model.

    The state follows the host's key/value cache: a call without one, or with an empty one, reads a
    new sequence from the initial memory; a call with a filled one goes on where the call that
    filled it ended. Each cache has a state of its own, which is pickled and copied with it
    (:meth:`save_cache` for a file). A pass is its thread's own: threads may share the model, with a
    cache each.

    For documents longer than the host's window, and for truncated backpropagation, set ``carry``: a
    call that would start from the initial memory then starts a new segment with the memory that the
    last call left: one conversation a model, not one a thread. It is kept with its history: call
    :meth:`detach` where gradients are to stop. Not with ``generate(use_cache=False)``, whose every
    step reads the prompt again, as a new call; and after a beam search what is carried belongs to
    the beams: call :meth:`reset`.
    """

    def __init__(self, decoder: nn.Module, blocks: dict[int, nn.Module], host: Host, options: dict):
        self.carry = False
        self.options = options  # of add_memory
        self._decoder = decoder
        self._blocks = blocks
        self._host = host
        self.frozen: list[nn.Parameter] = []
        self._names = list(inspect.signature(decoder.forward).parameters)
        self._config = getattr(decoder, "config", None)
        self._carried: dict[int, MemoryState] | None = None
        self._has_warned = False
        self._begin_anew()
        self._handles = [
            # before others, so that a pass which one of them ends was begun
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            decoder.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]
        for index, block in blocks.items():
            hook = functools.partial(self._read, index)
            attention = host.attention_of(block)
            self._handles.append(attention.register_forward_hook(hook, with_kwargs=True))
            self._handles.append(block.register_forward_hook(functools.partial(self._leave, index)))

    def _begin_anew(self) -> None:
        # caches that another filled are not this one's, unless their weights are equal
        self._owner = next(_owners)
        memories[self._owner] = self
        # the pass that runs, each thread's own: its attribute call
        self._local = threading.local()
        # place of a tensor that each pass makes anew -> the pass; see Host.pass_keys
        self._recorded: weakref.WeakValueDictionary[tuple, _Pass] = weakref.WeakValueDictionary()

    def __getstate__(self):
        names = ("_owner", "_local", "_recorded")
        state = {name: value for name, value in self.__dict__.items() if name not in names}
        if self._carried is not None:
            state["_carried"] = {index: state.detach() for index, state in self._carried.items()}
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
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
            self._check_state(state)
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

    def save_cache(self, path: str | Path, cache: object) -> None:
        """Write a key/value cache and the memory that goes with it as one safetensors file.

        A chat goes on from it in another process, in mid-segment too, bit for bit as it would have
        here.

        Args:
            path: of the file, which is replaced when the new one is whole.
            cache: a ``DynamicCache`` that this model filled, of windows too.

        Raises:
            ValueError: the cache is empty, or another model's.
            NotImplementedError: it is a cache of another kind.
        """
        kept = self._kept(cache)
        if kept is None:
            raise ValueError("save_cache: the cache is empty")
        caches.write(path, cache, kept, self.fingerprint())

    def load_cache(
        self, path: str | Path, cache: object, device: torch.device | str | None = None
    ) -> None:
        """Fill an empty cache with what :meth:`save_cache` wrote, for this model to go on from.

        Args:
            path: of the file.
            cache: an empty ``DynamicCache``, made as the saved one was.
            device: of what is loaded; that of the memory layers unless given.

        Raises:
            OSError: there is no such file.
            ValueError: it is damaged, holds something else, or is of a model with other weights,
                those of the host and of active adapters included.
            NotImplementedError: the cache is of another kind than the saved one.

        The cache is filled when all was checked; what is refused leaves it empty.
        """
        caches.check_empty(cache)
        layers = self.layers
        if device is None:
            device = getattr(layers[0].any_parameter(), "device", "cpu")
        saved = caches.read(path, self.fingerprint(), device)
        state = saved.state
        self._check_state(state)
        shapes = [layer.cache_shapes().items() for layer in layers]
        state.check_cache(
            {f"{index}.{name}": shape for index, own in enumerate(shapes) for name, shape in own}
        )
        caches.fill(cache, saved)
        states = dict(zip(self._blocks, part_banks(state), strict=True))
        self._tie(cache, states, saved.num_columns)

    def remove(self) -> None:
        """Take the layers and hooks out; what was frozen is trainable again."""
        caches.retire(self._owner, self.fingerprint())
        for handle in self._handles:
            handle.remove()
        for block in self._blocks.values():
            del block.memory
        for parameter in self.frozen:
            parameter.requires_grad_(True)

    def _check_state(self, state: MemoryState) -> None:
        """Raise ValueError unless a state of all layers' banks is of these layers' sizes."""
        layers, slots, rule = self.layers, self.options["memory_slots"], self._rule
        length, tokens_per_slot, _ = rule
        state.check(len(layers), state.batch, slots, layers[0].dim, length, tokens_per_slot)

    @property
    def _rule(self) -> Rule:
        """How the layers take their input in segments."""
        layer = self.layers[0]
        options = self.options
        # a pickle from before there was such an option has none
        length = options.get("segment_length", options["memory_slots"])
        return Rule(length, layer.tokens_per_slot, layer.causal)

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

    def fingerprint(self) -> str:
        """Of the decoder's weights, those of the layers included: another model has another."""
        # which the shapes of weights do not tell
        note, rule = f"{self.options['num_heads']} heads", self._rule
        if rule != Rule(self.options["memory_slots"]):
            # as it was before there were other rules: files of caches have it
            note += f", {tuple(rule)}"
        return fingerprint(self._decoder, note)

    def _running(self) -> _Call | None:
        """The pass that this thread runs, of which a hook calls the model again."""
        call = getattr(self._local, "call", None)
        if call is None or torch.compiler.is_compiling():
            return call
        frames, frame = set(), sys._getframe(1)
        while frame is not None:
            frames.add(frame)
            frame = frame.f_back
        # Ctrl-C ends a pass without a call of its hooks
        while call is not None and call.frame not in frames:
            call = call.outer
        return call

    def _begin(self, decoder: nn.Module, args: tuple, kwargs: dict):
        """Before the decoder: find out what the pass starts from, and which tokens are real."""
        frame = None if torch.compiler.is_compiling() else sys._getframe(1)
        call = _Call(self._running(), frame)
        self._local.call = call
        if getattr(decoder, "_is_replica", False):
            raise RuntimeError(
                "add_memory: nn.DataParallel copies the host's blocks to each device, but their "
                "memory is that of the first; use DistributedDataParallel, or one device"
            )
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tokens = named.get("input_ids")
        tokens = named.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return None
        if self.carry:
            self._check_carry()
        is_training = decoder.training and torch.is_grad_enabled()
        if is_training and not self._has_warned and not torch.compiler.is_compiling():
            self._has_warned = warn_of_frozen(decoder, self.layers)
        batch, length = tokens.shape[:2]
        call.cache = self._host.cache(named)
        if call.cache is not None:
            leave_graph(
                "add_memory: torch.compile(fullgraph=True) and torch.export take no "
                "past_key_values beside a memory, whose place in its segment is another at every "
                "step; pass use_cache=False"
            )
        kept = self._kept(call.cache)
        call.num_columns = length + (0 if kept is None else kept.num_columns)
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
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        read = read_tokens(mask, positions, batch, length, call.num_columns)
        use_cache = named.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self._config, "use_cache", False)
        # the cache that a compiled pass makes cannot be tied to, and is refused later
        keep = call.cache is not None or (bool(use_cache) and not torch.compiler.is_compiling())
        is_recorded = torch.is_grad_enabled()
        call.start = _Pass(states, read, keep, is_recorded)
        if isinstance(positions, Tensor) and is_recorded:
            # not the caller's: Host.pass_keys want a tensor of this pass alone
            return (), {**named, "position_ids": positions.clone()}
        return None

    def _check_carry(self) -> None:
        if torch.compiler.is_exporting():
            raise NotImplementedError(
                "add_memory: torch.export takes no carry: what one call leaves for the next would "
                "not be in the program; set carry = False"
            )
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "add_memory: backward runs a whole pass again, which by now would start from "
                "another carried memory; with carry, checkpoint blocks and not the model "
                "(gradient_checkpointing_enable)"
            )

    def _kept(self, cache: object | None) -> Kept | None:
        """What a cache carries for us, None if it is empty."""
        if cache is None:
            return None
        if isinstance(cache, (tuple, list)):
            raise TypeError(
                "add_memory: past_key_values must be a transformers Cache, which the memory can be "
                "tied to, got a tuple; pass past_key_values=DynamicCache() from the first call on"
            )
        if not hasattr(cache, "get_seq_length"):
            raise TypeError(
                f"add_memory: a {type(cache).__name__} holds several sequences in pages, which the "
                f"memory cannot follow; use generate in place of continuous batching"
            )
        # of static caches a tensor: the device is waited for
        length = int(cache.get_seq_length())
        if length == 0:
            return None
        kept = getattr(cache, KEPT, None)
        # a cache from elsewhere, or a copy of one: it goes on with weights as its model has them
        if kept is None or (
            kept.owner != self._owner and caches.print_of(kept) != self.fingerprint()
        ):
            raise ValueError(
                "add_memory: the cache holds tokens that this memory has not read: it was filled "
                "before the memory was added, by another model or under torch.compile; see "
                "AddedMemory.load_cache for one that was saved"
            )
        if kept.length != length:
            raise ValueError(
                f"add_memory: the cache holds {length} tokens, but when the memory last read there "
                f"were {kept.length}; it cannot follow what is cut off or put in"
            )
        return kept

    def _read(self, index: int, attention: nn.Module, args: tuple, kwargs: dict, output):
        """After a block's self-attention: the memory reads its output, and adds to it."""
        call, key = getattr(self._local, "call", None), self._host.pass_key(kwargs)
        current = None if call is None else call.start
        recorded = self._recomputed(key, current)
        if recorded is not None:
            call, current = None, recorded
        elif current is None:
            raise RuntimeError(
                "add_memory: a block runs by itself, and not as part of a forward pass whose "
                "memory is known. If backward recomputes it (gradient checkpointing), use "
                "use_reentrant=False, and no tensors of position_ids that several passes share"
            )
        elif index in call.outgoing:
            raise RuntimeError(f"add_memory: block {index} ran twice in one forward pass")
        elif current.is_recorded:
            call.is_cut |= not torch.is_grad_enabled()
            if self.carry and call.is_cut:
                raise RuntimeError(
                    "add_memory: gradients cannot flow through a carried memory under reentrant "
                    "gradient checkpointing; use use_reentrant=False"
                )
            self._record(key, current)
        x = self._host.attended(output)
        layer = self._blocks[index].memory

        def step(piece: Tensor, banks: list[Tensor], cache: SegmentCache):
            read, written = layer(piece, banks[0], cache=cache)
            return read, [written]

        inputs, lengths = x, None
        if current.tokens is not None:
            real, order, lengths = current.tokens
            real = real.to(x.device, non_blocking=True)[:, :, None]
            order = order.to(x.device, non_blocking=True)
            # what the host computes at the padding may be NaN, which a factor of 0 lets through
            inputs = gather(x.masked_fill(~real, 0.0), order)
        read, state = run_segments(
            step,
            inputs,
            current.states[index],
            self._rule,
            lengths,
            keep=current.keep,
        )
        if current.tokens is not None:
            read = torch.where(real, spread(read, order, lengths), x)
        if call is not None:
            call.outgoing[index] = state
        return self._host.replace_attended(output, read)

    def _leave(self, index: int, block: nn.Module, args: tuple, output) -> None:
        """After a block: remember its output, if what is carried may need it."""
        call = getattr(self._local, "call", None)
        if not self.carry or call is None or index not in call.outgoing:
            return
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, Tensor) and output.requires_grad:
            call.outputs[index] = output

    def _behind(self, index: int, state: MemoryState, output: Tensor | None) -> MemoryState:
        """What a block carries; see :class:`_Behind`."""
        parameters = self._blocks[index].parameters()
        if output is None or all(type(parameter) in ORDINARY for parameter in parameters):
            return state
        return MemoryState([_Behind.apply(bank, output) for bank in state.end_segment().banks])

    def _recomputed(self, key: Tensor | None, current: _Pass | None) -> _Pass | None:
        """The pass of which backward recomputes a block; None if it does not."""
        if key is None or torch.compiler.is_compiling():
            return None
        # while a pass runs, a backward within it may reach a block of an earlier one; private to
        # PyTorch, as its own checkpoints ask for it
        if current is not None and torch._C._current_graph_task_id() == -1:
            return None
        recorded = self._recorded.get(_place(key))
        # the pass itself, where a backward runs a whole one: a checkpoint around the model
        return None if recorded in (None, current) or recorded.is_ambiguous else recorded

    def _record(self, key: Tensor | None, current: _Pass) -> None:
        """Remember the pass as long as the tensor lives, which recomputing a block needs too."""
        if key is None or torch.compiler.is_compiling():
            return
        earlier = self._recorded.get(_place(key))
        if earlier is current:
            return
        if earlier is not None:
            earlier.is_ambiguous = current.is_ambiguous = True
        self._recorded[_place(key)] = current
        # no cycle: what a pass starts from does not know what it makes
        key._lm2_pass = current

    def _end(self, decoder: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """After the decoder, also when it raised: hand the states to the cache."""
        call = getattr(self._local, "call", None)
        if call is None:
            return
        self._local.call = call.outer
        if call.start is None or output is None:
            return
        missing = sorted(set(self._blocks) - set(call.outgoing))
        if missing:
            raise RuntimeError(f"add_memory: the forward pass left out blocks {missing}")
        values = list(output.values()) if isinstance(output, dict) else output
        if call.is_cut and self._is_cut_off(values):
            raise RuntimeError(
                "add_memory: no gradient reaches the memory: reentrant gradient checkpointing "
                "needs an input that requires gradients, and the frozen embeddings give none. Use "
                "use_reentrant=False (Trainer: gradient_checkpointing_kwargs="
                "{'use_reentrant': False}), or call model.enable_input_require_grads() first"
            )
        # in the blocks' order
        states = {index: call.outgoing[index] for index in self._blocks}
        if self.carry:
            self._carried = {
                index: self._behind(index, state, call.outputs.get(index))
                for index, state in states.items()
            }
        cache = call.cache
        if cache is None and call.start.keep:
            # not the legacy format, a tuple: no state can be tied to it
            cache = next((v for v in values if hasattr(v, "get_seq_length")), None)
        if cache is not None:
            self._tie(cache, states, call.num_columns)

    def _is_cut_off(self, values: Sequence) -> bool:
        """Whether the layers would learn, but no result of the pass requires gradients."""
        learns = any(p.requires_grad for layer in self.layers for p in layer.parameters())
        return learns and not any(isinstance(v, Tensor) and v.requires_grad for v in values)

    def _tie(self, cache: object, states: dict[int, MemoryState], num_columns: int) -> None:
        """Give a cache the states that belong to what it holds."""
        caches.follow(cache)
        # not num_columns: of windows, and of some static caches, it is what they call it
        length = int(cache.get_seq_length())
        setattr(cache, KEPT, Kept(self._owner, states, num_columns, length))


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor lies: what recomputing gets may be another one, of the same place."""
    # not data_ptr, which tensors without numbers have not
    return tensor.untyped_storage()._cdata, tensor.storage_offset()
