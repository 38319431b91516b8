"""What a memory does while a model runs: gates, reads, writes, and the bank that is left.

:func:`watch` puts hooks on the memory layers of a model and nowhere else. They compute from a
layer's inputs, in float32 (float64 for float64) and without gradients, what the layer computed on
its way; what the model returns, its gradients and the random numbers that it draws are bit for bit
those of a model that nobody watches.

What is measured is named in :data:`FIGURES`. Each is a mean over what it is taken of: gates and
entropies of tokens, ``written`` of slots, the others of the rows of a batch.
"""

import contextlib
import math
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm2_kernels import figures, terminal
from lm2_kernels.chunks import num_rows, sum_by_slot
from lm2_kernels.layers.base import MemoryLayer, ordinary_parameter
from lm2_kernels.layers.paper import PaperMemory
from lm2_kernels.plain import plain_parameters
from lm2_kernels.state.cache import SegmentCache
from lm2_kernels.state.segments import leave_graph

__all__ = ["CHANGED", "FIGURES", "LOW", "READ", "Record", "effective_rank", "mean_cosine", "watch"]

# a gate is closed below LOW and open above 1 - LOW
LOW = 0.1
# a slot is written if its row changed by more than this share of its length
CHANGED = 0.1
# a slot is read if its weight is more than this share of what it has where all slots weigh the same
READ = 0.5

_GATES = ("input_gate", "forget_gate", "output_gate")
_OTHERS = ("written", "read", "entropy", "entropy_share", "rank", "cosine", "rms")
FIGURES = (*(f"{gate}{part}" for gate in _GATES for part in ("", "_low", "_high")), *_OTHERS)
_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextlib.contextmanager
def watch(model: nn.Module) -> Iterator["Record"]:
    """Record what the memory layers of a model do, as long as the block lasts.

    What a layer recomputes in backward is not recorded again, and nothing is under ``torch.func``.
    ``torch.compile`` breaks its graph at a watched layer, and raises with ``fullgraph=True``; what
    was compiled before knows of no hooks, so a compiled model is refused. Dropout is left out:
    what is recorded is what the layer would compute without. A module that somebody put in the
    place of a projection, or hooked, is called once more, in evaluation mode.

    Args:
        model: with memory layers anywhere: an :class:`lm2_kernels.LM2ForCausalLM`, a model patched
            by :func:`lm2_kernels.add_memory` or :func:`lm2_kernels.swap_memory`, a layer by itself.

    Yields:
        The record, which can be read at any time, and afterwards.

    Raises:
        ValueError: the model has no memory layer, is compiled, or is being watched.
        NotImplementedError: under ``torch.export``, from the layer.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MemoryLayer)}
    if not layers:
        raise ValueError(f"watch: the {type(model).__name__} has no memory layer")
    for module in model.modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(
                f"watch: the {type(module).__name__} is compiled, and compiled code calls no "
                f"hooks; watch the model before torch.compile, which has the same weights"
            )
    if any(layer in _watched for layer in layers.values()):
        raise ValueError("watch: the model is being watched already; end that block first")
    record, handles = Record(layers), []
    try:
        for name, layer in layers.items():
            seen = record._layers[name]
            _watched.add(layer)
            handles.append(layer.register_forward_pre_hook(seen.before, with_kwargs=True))
            # first of all: before a sharded layer lets its weights go
            hook = layer.register_forward_hook(seen.after, with_kwargs=True, prepend=True)
            handles.append(hook)
        yield record
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            _watched.discard(layer)


class Record:
    """What :func:`watch` saw of a model.

    A segment is what a layer read between two places where a segment begins, in one piece or in
    several; a layer that is called by itself, without a cache, reads a segment a call. Pieces of
    rows that stand at different places in their segments belong to the segment that was open.

    In pieces, ``read``, ``rank``, ``cosine`` and ``rms`` are those of the segment as far as it has
    come. They are left out where a layer cannot know them: where rows stand at different places, or
    somebody reordered them, or began in mid-segment.
    """

    def __init__(self, layers: Iterable[str]):
        self._layers = {name: _Layer() for name in layers}

    def __repr__(self) -> str:
        counts = {name: len(layer.segments) for name, layer in self._called().items()}
        return f"Record(segments {counts})"

    def _called(self) -> dict[str, "_Layer"]:
        return {name: layer for name, layer in self._layers.items() if layer.segments}

    def segments(self) -> dict[str, list[dict[str, float | None]]]:
        """Of each layer that was called, by its name in the model, :data:`FIGURES` by segment.

        None is what there is no number of: a gate that the layer has not, the cosine of one row.
        """
        return {
            name: [_means([segment.numbers()]) for segment in layer.segments]
            for name, layer in self._called().items()
        }

    def summary(self) -> dict[str, float | int | None]:
        """All segments together: plain numbers, as ``json.dumps`` takes them.

        Returns:
            ``segments`` and ``tokens`` (a batch's rows together) that a layer read, the most of
            any; each of :data:`FIGURES`, the mean of the layers; and ``<name>/<figure>`` for each
            layer, whose segments weigh by what there was of them.
        """
        called = self._called()
        by_layer = {
            name: _means([segment.numbers() for segment in layer.segments])
            for name, layer in called.items()
        }
        result: dict[str, float | int | None] = {
            "segments": max((len(layer.segments) for layer in called.values()), default=0),
            "tokens": max((layer.tokens() for layer in called.values()), default=0),
        }
        result |= _mean_of_layers(by_layer.values())
        for name, own in by_layer.items():
            result |= {f"{name}/{figure}": value for figure, value in own.items()}
        return result

    def table(self, *, by_segment: bool = False) -> str:
        """A line a layer, and one of their means.

        Of a gate the mean, and per cent of it below 0.1 and above 0.9.

        Args:
            by_segment: also a line for each segment of a layer.
        """
        head = ["layer", "segment", *(gate.removesuffix("_gate") for gate in _GATES), *_OTHERS]
        rows, summary = [head], self.summary()
        for name, segments in self.segments().items():
            for number, values in enumerate(segments if by_segment else ()):
                rows.append([name, str(number), *_cells(values)])
            own = {figure: summary[f"{name}/{figure}"] for figure in FIGURES}
            rows.append([name, "all", *_cells(own)])
        if len(self._called()) != 1:
            rows.append(["all", "all", *_cells(summary)])
        return "\n".join(terminal.columns(rows))

    def reads(self) -> dict[str, Tensor]:
        """Of each layer that was called, how its last segment's tokens read the slots.

        Returns:
            (T, N) on the CPU by the layers' names in the model: the weights of the batch's first
            row, the mean of the heads, without padding.
        """
        return {name: layer.segments[-1].reads() for name, layer in self._called().items()}

    def plot(self, path: str | Path) -> list[Path]:
        """Heat maps as PNG and SVG, a line of three for each layer, all of the batch's first row.

        The weights of the last segment's reads (tokens x slots, the mean of the heads), its gates
        (the mean of the width), and the root mean square of each slot's row after each segment.

        Args:
            path: of both files, without ``.png`` and ``.svg``.

        Returns:
            The two files.

        Raises:
            ValueError: nothing was recorded, or matplotlib is not there.
        """
        called, path = self._called(), Path(path)
        if not called:
            raise ValueError("plot: nothing was recorded")
        if path.suffix in (".png", ".svg"):
            path = path.with_suffix("")
        foot = ["First row of the batch; reads and gates of the last segment."]
        with figures.style():
            size = (9.0, 0.5 + 2.2 * len(called))
            figure = figures.new_figure(size, "What the memory does", foot)
            grid = figure.subplots(len(called), 3, squeeze=False)
            for line, (name, layer) in zip(grid, called.items(), strict=True):
                _draw(figure, line, name, layer)
            return figures.save(figure, path)

    def to_tensorboard(self, writer: object, step: int) -> None:
        """Hand :meth:`summary` and the last segment's reads to a ``SummaryWriter``.

        Args:
            writer: with ``add_scalar(tag, value, step)`` and
                ``add_image(tag, values, step, dataformats="HW")``.
            step: of what.
        """
        for name, value in self.summary().items():
            if value is not None:
                writer.add_scalar(f"memory/{name}", value, step)
        for name, reads in self.reads().items():
            most = reads.max().clamp(min=torch.finfo(reads.dtype).tiny)
            writer.add_image(f"memory/{name}/reads", reads / most, step, dataformats="HW")


def effective_rank(bank: Tensor) -> Tensor:
    """How many directions the rows of banks (..., N, D) take up, (...); 0 for a bank of zeros.

    ``exp(-sum_i p_i ln p_i)`` with ``p_i = s_i^2 / sum_j s_j^2`` of the singular values, not
    centred: the effective rank (Roy and Vetterli, "The effective rank", EUSIPCO 2007) of
    ``M M^T``. Equal rows give 1, n orthogonal ones of one length n.
    """
    largest = bank.abs().amax(dim=(-2, -1), keepdim=True)
    scaled = bank / torch.where(largest > 0.0, largest, 1.0)
    squares = torch.linalg.svdvals(scaled).square()
    total = squares.sum(dim=-1)
    shares = squares / total[..., None]
    return torch.where(total > 0.0, torch.special.entr(shares).sum(dim=-1).exp(), 0.0)


def mean_cosine(bank: Tensor) -> Tensor:
    """The mean cosine of two rows of banks (..., N, D), (...); NaN with fewer than two.

    Of all pairs of rows that are not zero:
    ``(|sum_i u_i|^2 - n) / (n (n - 1))``, with ``u_i = M_i / |M_i|``.
    """
    lengths = torch.linalg.vector_norm(bank, dim=-1, keepdim=True)
    is_there = lengths > 0.0
    units = bank / torch.where(is_there, lengths, 1.0)
    count = is_there.sum(dim=(-2, -1))
    squares = units.sum(dim=-2).square().sum(dim=-1)
    return (squares - count) / (count * (count - 1))


class _Piece:
    """What one call of a layer computes on its way, found again from its inputs."""

    def __init__(self, layer: MemoryLayer, given: dict, pooled: Tensor | None, written: Tensor):
        x, memory, cache = given["x"], given["memory"], given.get("cache")
        self.offset, self.mask = given.get("slot_offset", 0), given.get("slot_mask")
        self.num_tokens, c = x.shape[1], layer.tokens_per_slot
        dtype = torch.promote_types(x.dtype, torch.float32)
        real = None if cache is None else cache.real(x.device)
        # which tokens are, (B, T)
        self.real = x.new_ones(x.shape[:2], dtype=torch.bool) if real is None else real[:, :, 0]
        x = torch.where(self.real[:, :, None], x, 0.0).to(dtype)
        # the bank as the segment found it, or the rows of it that a causal layer is given
        self.found = memory.detach().to(dtype)
        self.found_by_piece = cache is not None and layer.causal
        if self.mask is not None:
            self.found = self.found.masked_fill(~self.mask[:, :, None], 0.0)
        # the rows that change, and what becomes of them: a row a slot, or a token's proposal for
        # the slot of which so many tokens have one
        self.tokens_per_slot = 1
        if cache is None:
            end = self.offset + num_rows(self.num_tokens, c)
            rows, written = memory[:, self.offset : end], written[:, self.offset : end]
            by_token = rows.repeat_interleave(c, dim=1)[:, : self.num_tokens]
        else:
            rows = memory if layer.causal else cache.rows_of(memory)
            by_token = cache.by_token(rows)
            if not cache.writes_rows:
                rows, self.tokens_per_slot = by_token, c
        # no graph: it would live as long as the segment
        self.rows, self.written = rows.detach().to(dtype), written.detach().to(dtype)
        # which rows are written: where lengths differ, there is a row a token
        self.is_row = self.real
        if rows.shape[1] != self.num_tokens:
            self.is_row = self.real.new_ones(rows.shape[:2])
        # (B, H, T, N), and (B or 1, T, N)
        self.weights, self.visible, read = _reads(
            layer, x, self.found, cache, self.offset, self.mask
        )
        if isinstance(layer, PaperMemory):
            self.gates = {
                "input_gate": torch.sigmoid(_project(layer.input_gate_proj, x)),
                "forget_gate": torch.sigmoid(_project(layer.forget_gate_proj, read)),
                "output_gate": torch.sigmoid(_project(layer.output_gate_proj, read)),
            }
        elif layer.input_gate_projector.w.is_meta:
            # offloaded by now
            self.gates = {}
        else:
            num_pooled = 0 if pooled is None else self.offset * c
            pooled = _pooled(layer, x, cache, pooled, num_pooled)
            self.gates = _release_gates(layer, pooled, by_token.to(dtype))

    def figures(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, values, and which of them count, of what is said of tokens and of rows."""
        real, dtype = self.real, self.weights.dtype
        for name, gate in self.gates.items():
            yield name, gate.mean(dim=-1), real
            yield f"{name}_low", (gate < LOW).to(dtype).mean(dim=-1), real
            yield f"{name}_high", (gate > 1.0 - LOW).to(dtype).mean(dim=-1), real
        sums = self.weights.sum(dim=-1, keepdim=True)
        shares = self.weights / torch.where(sums > 0.0, sums, 1.0)
        entropy = torch.special.entr(shares).sum(dim=-1).mean(dim=1)
        number = self.visible.sum(dim=-1)
        yield "entropy", entropy, real & (number > 0)
        # of one slot nothing else can be said than that it is read
        most = number.clamp(min=2).to(dtype).log()
        yield "entropy_share", entropy / most, real & (number > 1)
        length = torch.linalg.vector_norm(self.rows, dim=-1)
        change = torch.linalg.vector_norm(self.written - self.rows, dim=-1)
        yield "written", (change > CHANGED * length).to(dtype), self.is_row

    def by_slot(self) -> tuple[Tensor, Tensor]:
        """Of each slot the weights in all, 1 where all weigh the same, and how many tokens see it.

        Both (B, N).
        """
        seen = self.visible & self.real[:, :, None]
        number = self.visible.sum(dim=-1, keepdim=True)
        relative = torch.where(seen, self.weights.mean(dim=1) * number, 0.0)
        return relative.sum(dim=1), seen.sum(dim=1)

    def forget_tokens(self) -> None:
        """Keep what the bank is made from."""
        del self.weights, self.visible, self.gates, self.rows


def _project(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, of a Linear in the precision of x."""
    weight, bias = plain_parameters(module, nn.Linear) or (None, None)
    if weight is not None:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    parameter = ordinary_parameter(module)
    was = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in was:
            part.training = False
        return module(x if parameter is None else x.to(parameter.dtype)).to(x.dtype)
    finally:
        for part, is_training in was:
            part.training = is_training


def _reads(
    layer: MemoryLayer,
    x: Tensor,
    bank: Tensor,
    cache: SegmentCache | None,
    slot_offset: int,
    slot_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of a layer's first round of reading, which slots are seen, and what is read."""
    num_tokens = x.shape[1]
    if cache is None and layer.causal:
        # nobody sees the others
        bank = bank[:, : slot_offset + num_tokens]
        slot_mask = None if slot_mask is None else slot_mask[:, : bank.shape[1]]
    key, value = (
        _projected(layer, kind, bank, cache).to(x.dtype).unflatten(-1, (layer.num_heads, -1))
        for kind in ("key", "value")
    )
    query = _project(layer.query_proj, x).unflatten(-1, (layer.num_heads, -1))
    slots = torch.arange(key.shape[1], device=x.device)
    if not layer.causal:
        visible = torch.ones(1, num_tokens, len(slots), dtype=torch.bool, device=x.device)
    elif cache is None:
        places = torch.arange(slot_offset, slot_offset + num_tokens, device=x.device)
        visible = (slots <= places[:, None])[None]
    else:
        visible = slots <= cache.positions(x.device)[..., None]
        visible = visible if visible.dim() == 3 else visible[None]
    if slot_mask is not None:
        visible = visible & slot_mask[:, None]
    scale = query.shape[-1] ** -0.5 if layer.scale is None else layer.scale
    scores = torch.einsum("bthk,bnhk->bhtn", query, key) * scale
    hidden = ~visible[:, None]
    # of a token that sees nothing, any weights: they are zeroed
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0)
    if layer.top_k is not None and layer.top_k < len(slots):
        # of equal scores the lower slots
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : layer.top_k]
        weights = weights * torch.zeros_like(weights).scatter(-1, best, 1.0)
    read = torch.einsum("bhtn,bnhk->bthk", weights, value).flatten(-2)
    return weights, visible, read


def _projected(layer: MemoryLayer, kind: str, bank: Tensor, cache: SegmentCache | None) -> Tensor:
    """Keys or values (B, N, D): those of earlier pieces are in the cache alone."""
    if cache is None or not cache.is_open:
        return _project(getattr(layer, f"{kind}_proj"), bank)
    kept = cache.kept(_name_of(layer, kind))
    return (kept[:, : cache.size] if layer.causal else kept).flatten(-2)


def _name_of(layer: MemoryLayer, kind: str) -> str:
    """Under which name the first round's keys or values are in a cache."""
    return f"{kind}0" if layer.causal else SegmentCache.constant_name(f"{kind}0")


def _pooled(
    layer: MemoryLayer,
    x: Tensor,
    cache: SegmentCache | None,
    pooled: Tensor | None,
    num_pooled: int,
) -> Tensor:
    """What the gates of a ReleaseMemory pool of the tokens, (B, 1 or T, D)."""
    active = torch.relu(layer.input_gate_projector.w.to(x.dtype) * x)
    num_tokens = x.shape[1]
    if layer.pooled_gate == "segment":
        count = num_tokens if cache is None else cache.tokens_read(len(x), x.device)[:, None, None]
        return active.sum(dim=1, keepdim=True) / count
    # not cumsum, which CUDA has no deterministic one of
    sums = torch.ones(num_tokens, num_tokens, dtype=x.dtype, device=x.device).tril() @ active
    if pooled is not None:
        sums = sums + pooled.to(x.dtype)[:, None]
    if cache is None:
        places = torch.arange(num_pooled, num_pooled + num_tokens, device=x.device)
    else:
        places = cache.positions(x.device)
    return sums / (places + 1)[..., None]


def _release_gates(layer: MemoryLayer, pooled: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Those of a ReleaseMemory, a row a token."""
    gates = _project(layer.input_gate_projector.linear, pooled)
    gates = gates + _project(layer.memory_gate_projector.linear, torch.tanh(rows))
    input_gate, forget_gate = gates.chunk(2, dim=-1)
    return {
        "input_gate": torch.sigmoid(input_gate + layer.input_bias.to(gates.dtype)),
        "forget_gate": torch.sigmoid(forget_gate + layer.forget_bias.to(gates.dtype)),
    }


class _Layer:
    """What was seen of one layer, by its hooks."""

    def __init__(self):
        self.segments: list[_Segment] = []
        # what the piece that runs found in its cache: keys, and the pooled sum
        self._keys: Tensor | None = None
        self._pooled: Tensor | None = None

    def tokens(self) -> int:
        return sum(int(segment.tokens) for segment in self.segments)

    def before(self, layer: MemoryLayer, args: tuple, kwargs: dict) -> None:
        """Before the layer: what it will replace in its cache."""
        cache = kwargs.get("cache")
        self._keys = self._pooled = None
        if cache is not None and not torch.compiler.is_compiling() and _is_seen():
            self._keys = cache.kept(_name_of(layer, "key"))
            with torch.no_grad():
                self._pooled = cache.running_sum("pooled")

    def after(self, layer: MemoryLayer, args: tuple, kwargs: dict, output: tuple) -> None:
        """After the layer."""
        leave_graph(
            "watch: torch.compile(fullgraph=True) and torch.export take no memory layer that is "
            "being watched; end the block of watch first"
        )
        if not _is_seen() or not len(output[0]):
            return
        given = {**dict(zip(("x", "memory"), args, strict=False)), **kwargs}
        cache = given.get("cache")
        pooled = given.get("pooled_sum") if cache is None else self._pooled
        with torch.no_grad(), torch.autocast(given["x"].device.type, enabled=False):
            self._add(_Piece(layer, given, pooled, output[1]), layer, cache)
        self._keys = self._pooled = None

    def _add(self, piece: "_Piece", layer: MemoryLayer, cache: SegmentCache | None) -> None:
        last = self.segments[-1] if self.segments else None
        begins = cache is None or cache.start == 0
        if last is None or begins or last.has_ended:
            if last is not None:
                last.end()
            last = _Segment(is_whole=begins)
            self.segments.append(last)
        elif not last.is_before(cache.start, self._keys):
            last.is_whole = False
        is_open = cache is not None and cache.is_open
        keys = cache.kept(_name_of(layer, "key")) if is_open else None
        last.add(piece, keys)


def _is_seen() -> bool:
    """Whether a call is the model's own, and its numbers can be kept.

    Not where backward computes it again, nor under torch.func. Both private to PyTorch, as its own
    checkpoints ask for them.
    """
    is_backward = torch._C._current_graph_task_id() != -1
    return not is_backward and not torch._C._are_functorch_transforms_active()


class _Segment:
    """What a layer did in a segment, added up over its pieces."""

    def __init__(self, *, is_whole: bool):
        # whether all of it was seen, by rows that stay what they are: else only its tokens count
        self.is_whole = is_whole
        self.tokens: Tensor | int = 0
        # the root mean square of the first row's slots, once it has ended
        self.slots: Tensor | None = None
        # of a figure its total, and of how many
        self._sums: dict[str, Tensor] = {}
        self._of_slots: dict[str, Tensor] | None = None
        self._pieces: list[_Piece] = []
        self._relative: Tensor | None = None  # (B, N): weights, 1 where all slots weigh the same
        self._seen: Tensor | None = None  # (B, N): by how many tokens
        self._size = 0
        self._keys: Tensor | None = None
        # of the first row of a batch, of each piece: weights, gates, and which tokens are real
        self._maps: list[tuple[Tensor, dict[str, Tensor], Tensor]] = []

    @property
    def has_ended(self) -> bool:
        return self._of_slots is not None

    def is_before(self, start: int | None, keys: Tensor | None) -> bool:
        """Whether a piece that begins there, and finds these keys, is the next one's."""
        # what is reordered is copied; the pointer is this tensor's as long as it is held
        return (
            start == self._size
            and keys is not None
            and self._keys is not None
            and keys.data_ptr() == self._keys.data_ptr()
        )

    def add(self, piece: "_Piece", keys: Tensor | None) -> None:
        """Add a piece, which leaves its segment's keys, or None if the segment has ended."""
        self.tokens = self.tokens + piece.real.sum()
        self._keys = None if keys is None else keys.detach()
        self._size += piece.num_tokens
        for name, values, is_counted in piece.figures():
            added = _total(values, is_counted)
            self._sums[name] = self._sums[name] + added if name in self._sums else added
        gates = {name: gate[0].mean(dim=-1) for name, gate in piece.gates.items()}
        self._maps.append((piece.weights[0].mean(dim=0), gates, piece.real[0]))
        if not self.is_whole:
            self._pieces, self._relative, self._seen = [], None, None
            return
        relative, seen = piece.by_slot()
        if self._relative is not None:
            missing = (0, seen.shape[1] - self._seen.shape[1])
            relative, seen = (
                relative + F.pad(self._relative, missing),
                seen + F.pad(self._seen, missing),
            )
        self._relative, self._seen = relative, seen
        piece.forget_tokens()
        self._pieces.append(piece)
        if keys is None:
            self._finish()

    def _finish(self) -> None:
        if self._of_slots is None:
            self._of_slots, self.slots = self._look()
            self._pieces, self._relative, self._seen, self._keys = [], None, None, None

    def end(self) -> None:
        """Another segment begins: what was kept for pictures of this one goes."""
        self._finish()
        self._maps = []

    def _look(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """What is said of the slots, and the first row's root mean squares (N,)."""
        if not self._pieces:
            return {}, None
        is_seen = self._seen > 0
        is_read = self._relative > READ * self._seen
        count = is_seen.sum(dim=1)
        share = (is_read & is_seen).sum(dim=1).to(self._relative) / count.clamp(min=1)
        bank, mask = _bank(self._pieces), self._pieces[0].mask
        if mask is None:
            mask = bank.new_ones(bank.shape[:2], dtype=torch.bool)
        bank = bank.masked_fill(~mask[:, :, None], 0.0)
        # of a bank that is not finite there is no rank, and looking for it would raise
        is_finite = bank.isfinite().all(dim=2).all(dim=1)
        bank = torch.where(is_finite[:, None, None], bank, 0.0)
        cosine = mean_cosine(bank)
        squares = bank.square().mean(dim=-1)
        rms = (squares.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sqrt()
        return {
            "read": _total(share, count > 0),
            "rank": _total(effective_rank(bank), is_finite),
            "cosine": _total(cosine, is_finite & ~cosine.isnan()),
            "rms": _total(rms, is_finite),
        }, squares[0].sqrt()

    def numbers(self) -> dict[str, Tensor]:
        """Of each figure its total, and of how many. (2,)"""
        with torch.no_grad():
            of_slots = self._look()[0] if self._of_slots is None else self._of_slots
        return self._sums | of_slots

    def rows(self) -> Tensor | None:
        """The root mean squares of the first row's slots, (N,)."""
        return self._look()[1] if self._of_slots is None else self.slots

    def reads(self) -> Tensor:
        """The weights of the first row's real tokens, (T, N), on the CPU."""
        most = max(weights.shape[1] for weights, _, _ in self._maps)
        parts = [
            F.pad(weights.cpu(), (0, most - weights.shape[1]))[real.cpu()]
            for weights, _, real in self._maps
        ]
        return torch.cat(parts)

    def gates(self) -> dict[str, Tensor]:
        """The gates of the first row's real tokens, (T,), on the CPU."""
        return {
            name: torch.cat([gates[name].cpu()[real.cpu()] for _, gates, real in self._maps])
            for name in self._maps[0][1]
        }


def _bank(pieces: "list[_Piece]") -> Tensor:
    """A segment's bank after its pieces, (B, N, D)."""
    first = pieces[0]
    new = torch.cat([piece.written for piece in pieces], dim=1)
    real = torch.cat([piece.is_row for piece in pieces], dim=1)
    found = first.found
    if first.found_by_piece:
        found = torch.cat([piece.found for piece in pieces], dim=1)
    if first.tokens_per_slot > 1:
        new = torch.where(real[:, :, None], new, 0.0)
        counts = sum_by_slot(real.to(new.dtype), first.tokens_per_slot)
        new = sum_by_slot(new, first.tokens_per_slot) / counts.clamp(min=1.0)[:, :, None]
        real = counts > 0.0
    start, end = first.offset, first.offset + new.shape[1]
    new = torch.where(real[:, :, None], new, found[:, start:end])
    return torch.cat([found[:, :start], new, found[:, end:]], dim=1)


def _total(values: Tensor, is_counted: Tensor) -> Tensor:
    """The sum of those that count, and how many they are. (2,)"""
    kept = torch.where(is_counted, values, 0.0)
    return torch.stack([kept.sum(), is_counted.sum().to(values.dtype)])


def _means(segments: Iterable[dict[str, Tensor]]) -> dict[str, float | None]:
    """Each figure of segments together; None where there is none, or it is not finite."""
    totals = {figure: [0.0, 0.0] for figure in FIGURES}
    for numbers in segments:
        if not numbers:
            continue
        # all at once: a GPU waits for each number that is read
        values = torch.stack(list(numbers.values())).tolist()
        for name, (total, count) in zip(numbers, values, strict=True):
            totals[name][0] += total
            totals[name][1] += count
    return {
        name: total / count if count and math.isfinite(total) else None
        for name, (total, count) in totals.items()
    }


def _mean_of_layers(layers: Iterable[dict[str, float | None]]) -> dict[str, float | None]:
    layers, result = list(layers), {}
    for figure in FIGURES:
        values = [own[figure] for own in layers if own[figure] is not None]
        result[figure] = sum(values) / len(values) if values else None
    return result


def _cells(values: dict[str, float | None]) -> list[str]:
    """A line of the table, behind its names."""
    cells = []
    for gate in _GATES:
        mean, low, high = (values[f"{gate}{part}"] for part in ("", "_low", "_high"))
        cells.append("-" if mean is None else f"{mean:.3f} {100 * low:.0f}/{100 * high:.0f}")
    others = (values[figure] for figure in _OTHERS)
    return cells + ["-" if value is None else f"{value:.3f}" for value in others]


def _draw(figure: object, panels: Iterable, name: str, layer: _Layer) -> None:
    """The three heat maps of a layer."""
    last, (reads_panel, gates_panel, slots_panel) = layer.segments[-1], panels
    reads, gates = last.reads(), last.gates()
    image = figures.draw_heat(reads_panel, reads.tolist(), high=max(reads.max().item(), 1e-9))
    figure.colorbar(image, ax=reads_panel)
    reads_panel.set(title=f"{name or 'layer'}: reads", xlabel="slot", ylabel="token")
    # of an offloaded layer there are none
    rows = [gate.tolist() for gate in gates.values()] or [[math.nan]]
    image = figures.draw_heat(gates_panel, rows)
    figure.colorbar(image, ax=gates_panel)
    gates_panel.set(title="gates", xlabel="token")
    gates_panel.set_yticks(range(len(gates)), [gate.removesuffix("_gate") for gate in gates])
    slots = [segment.rows() for segment in layer.segments]
    most = max((len(rows) for rows in slots if rows is not None), default=1)
    squares = torch.full((most, len(slots)), math.nan)
    for column, rows in enumerate(slots):
        if rows is not None:
            squares[: len(rows), column] = rows.cpu()
    top = squares.nan_to_num().max().item()
    image = figures.draw_heat(slots_panel, squares.tolist(), high=max(top, 1e-9))
    figure.colorbar(image, ax=slots_panel)
    slots_panel.set(title="root mean square of slots", xlabel="segment", ylabel="slot")
    for panel in (reads_panel, gates_panel, slots_panel):
        for axis in (panel.xaxis, panel.yaxis):
            if panel is not gates_panel or axis is panel.xaxis:
                axis.get_major_locator().set_params(integer=True)
