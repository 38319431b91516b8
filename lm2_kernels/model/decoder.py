"""The reference language model: a Llama-3 style decoder whose blocks read and rewrite a memory.

Each block computes ``h = x + memory(self_attention(norm(x)))`` and ``h + mlp(norm(h))``: the memory
layer sits on the self-attention output, before the residual add. Input is taken in segments of
``segment_length`` tokens. A segment is its own self-attention window, its tokens at positions 0, 1,
...; what crosses from one segment to the next is the memory, which goes in and comes out as a
:class:`MemoryState`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm2_kernels import machine
from lm2_kernels.checks import check_int
from lm2_kernels.functional import initial_memory
from lm2_kernels.layers.paper import PaperMemory
from lm2_kernels.layers.release import ReleaseMemory
from lm2_kernels.layers.start import silence
from lm2_kernels.linear import apply_linear
from lm2_kernels.model.config import LM2Config
from lm2_kernels.model.generation import generate
from lm2_kernels.model.output import LM2Output
from lm2_kernels.plain import ORDINARY
from lm2_kernels.state import files
from lm2_kernels.state.cache import SegmentCache, on_device
from lm2_kernels.state.hub import Place
from lm2_kernels.state.memory import MemoryState
from lm2_kernels.state.segments import Rule, compress, gather, leave_graph, run_segments, spread

# rows of logits that are in memory at once while the loss is computed
_LOSS_ROWS = 1024


def _rotary(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions (T,) or (B, T), each (..., T, 1, dim): one axis for heads."""
    # float64: an angle of a late position has lost digits in float32
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    angles = positions[..., None, None] * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + dim / 2) of (B, T, H, dim) by their positions' angles."""
    first, second = x.chunk(2, dim=-1)
    # under autocast the angles are float32, and the cache should not be
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class SelfAttention(nn.Module):
    """Causal attention with rotary positions and grouped key and value heads."""

    def __init__(self, config: LM2Config):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: SegmentCache) -> Tensor:
        query, key, value = (
            apply_linear(x, layer).unflatten(-1, (-1, self.head_dim))
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        key, value = cache.extend("key", key), cache.extend("value", value)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        read = F.scaled_dot_product_attention(
            query, key, value, **_visibility(cache, x.device), enable_gqa=True
        )
        return apply_linear(read.transpose(1, 2).flatten(-2), self.o_proj)


def _visibility(cache: SegmentCache, device: torch.device) -> dict[str, object]:
    """What a piece's tokens see of the segment so far, as scaled_dot_product_attention takes it."""
    if cache.start is None:
        return {"attn_mask": cache.visible(device)[:, None, None]}
    if cache.start == 0:
        return {"is_causal": True}
    if cache.num_tokens == 1:
        return {}
    shape = (cache.num_tokens, cache.size)
    return {"attn_mask": torch.ones(shape, dtype=torch.bool, device=device).tril(cache.start)}


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LM2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = apply_linear(x, self.gate_proj), apply_linear(x, self.up_proj)
        return apply_linear(F.silu(gate) * up, self.down_proj)


class Block(nn.Module):
    """Self-attention with or without a memory layer, and the MLP."""

    def __init__(self, config: LM2Config, has_memory: bool):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.memory = _memory_layer(config) if has_memory else None
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, memory: Tensor | None, cos: Tensor, sin: Tensor, cache: SegmentCache
    ) -> tuple[Tensor, Tensor | None]:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, cache.scope("self_attn"))
        if self.memory is not None:
            attended, memory = self.memory(attended, memory, cache=cache.scope("memory"))
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), memory


def _memory_layer(config: LM2Config) -> nn.Module:
    options = {
        "dropout": config.memory_dropout,
        "causal": config.memory_causal,
        "write": config.write,
        "tokens_per_slot": config.tokens_per_slot,
        "candidate": config.candidate,
        "recompute": config.memory_recompute,
        "backend": config.backend,
    }
    if config.formulation == "paper":
        return PaperMemory(config.hidden_size, config.memory_heads, **options)
    return ReleaseMemory(
        config.hidden_size, config.memory_heads, pooled_gate=config.pooled_gate, **options
    )


class Decoder(nn.Module):
    """Embedding, blocks and the last norm; its parameters have the names of a Llama checkpoint."""

    def __init__(self, config: LM2Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, index in config.memory_layers)
            for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, ids: Tensor, banks: list[Tensor], cache: SegmentCache
    ) -> tuple[Tensor, list[Tensor]]:
        """The hidden states of one piece (B, T, D), and what it writes to each bank.

        See :meth:`MemoryState.piece` and :meth:`MemoryState.after`.
        """
        return self.run(self.embed_tokens(ids), banks, cache)

    def run(
        self, x: Tensor, banks: list[Tensor], cache: SegmentCache
    ) -> tuple[Tensor, list[Tensor]]:
        """:meth:`forward` of embeddings (B, T, D)."""
        config, banks, number = self.config, list(banks), 0
        positions = cache.positions(x.device)
        cos, sin = _rotary(positions, config.head_dim, config.rope_theta, x.dtype)
        for index, block in enumerate(self.layers):
            bank = 0 if config.flow == "depth" else number
            own = banks[bank] if block.memory is not None else None
            x, own = block(x, own, cos, sin, cache.scope(f"layers.{index}"))
            if block.memory is not None:
                banks[bank] = own
                number += 1
        return self.norm(x), banks


class LM2ForCausalLM(nn.Module):
    """The language model of the LM2 paper (arXiv 2502.06049), over either memory formulation.

    State dict: a Llama checkpoint's keys, and ``model.layers.<i>.memory.<parameter>``
    (:func:`release_state_dict` converts the released model's). With tied embeddings there is no
    ``lm_head.weight``; a checkpoint's must equal its embedding.
    """

    def __init__(self, config: LM2Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None
        if config.tie_word_embeddings:
            self.register_load_state_dict_pre_hook(_drop_tied_head)
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.initial_memory = None
        if config.memory_init == "learned" and config.num_banks > 0:
            shape = (config.num_banks, config.memory_slots, config.hidden_size)
            self.initial_memory = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of ``initializer_range``; all else as the layers start; ``zero_init``."""
        for module in self.modules():
            if isinstance(module, PaperMemory | ReleaseMemory | nn.RMSNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
        if self.initial_memory is not None:
            config = self.config
            bank = initial_memory(config.num_banks, config.memory_slots, config.hidden_size)
            with torch.no_grad():
                self.initial_memory.copy_(bank)
        if self.config.zero_init:
            for layer in self.memory_layers():
                silence(layer)

    def gradient_checkpointing_enable(self, *_: object, **__: object) -> None:
        """Raise NotImplementedError: what there is, is ``memory_recompute``."""
        raise NotImplementedError(
            "LM2ForCausalLM has no gradient checkpointing; with LM2Config(memory_recompute=True) "
            "the memory layers compute again what backward needs"
        )

    # its name in later versions of transformers
    activation_checkpointing_enable = gradient_checkpointing_enable

    def memory_layers(self) -> list[PaperMemory | ReleaseMemory]:
        """The memory layers, first block first."""
        return [block.memory for block in self.model.layers if block.memory is not None]

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> MemoryState:
        """The state before the first segment, in the parameters' dtype.

        Args:
            batch: B.
            device: of the banks; the parameters' unless given, but these may be offloaded.

        Returns:
            Banks (B, N, D): one for ``flow="depth"``, one a memory layer for ``flow="time"``, none
            without memory layers.
        """
        config, like = self.config, self.model.embed_tokens.weight
        check_int("initial_state", "batch", batch, 0)
        if config.num_banks == 0:
            return MemoryState.without_banks(batch)
        if self.initial_memory is not None:
            return MemoryState([bank.expand(batch, -1, -1) for bank in self.initial_memory])
        return MemoryState(
            [
                initial_memory(
                    batch,
                    config.memory_slots,
                    config.hidden_size,
                    config.memory_init,
                    device=device or like.device,
                    dtype=like.dtype,
                )
                for _ in range(config.num_banks)
            ]
        )

    def forward(
        self,
        input_ids: Tensor,  # (B, L)
        labels: Tensor | None = None,  # (B, L)
        memory: MemoryState | None = None,
        *,
        attention_mask: Tensor | None = None,  # (B, L)
        use_cache: bool = False,
        bptt_segments: int | None = None,
        return_logits: bool | None = None,
    ) -> LM2Output:
        """Run any number of tokens, a segment of at most ``segment_length`` at a time.

        ``torch.compile`` takes the model whole, as long as there is no ``attention_mask`` and no
        ``use_cache``: these depend on numbers that a graph does not see.

        A call goes on where ``memory`` stands: between two segments, or within one if it comes from
        a call with ``use_cache``. Calls equal one call, but for the loss, which does not predict a
        call's first token.

        Args:
            input_ids: (B, L) int64, L >= 1.
            labels: (B, L) int64, unshifted as in transformers: ``labels[:, t]`` is predicted at
                ``t - 1``, and -100 is not predicted at all.
            memory: the state that the call before returned; None starts afresh.
            attention_mask: (B, L), nonzero where a token is real. The other tokens are padding, on
                either side or between: each row computes what its real tokens alone would. It is
                read on the CPU: of one on another device, the call waits for it.
            use_cache: whether the returned state stands where the tokens end, with the keys and
                values of its segment, so that the next call goes on within the segment. Otherwise
                the next call starts a new segment.
            bptt_segments: detach the memory before every ``bptt_segments``-th segment of this call,
                so that gradients reach back over at most that many; None never does. What
                ``memory`` brings in is the caller's to detach.
            return_logits: whether to; by default unless there are labels. The loss alone never
                holds more than some rows of logits.

        Returns:
            logits (B, L, V), 0 at the padding, the loss, and the state after the tokens.

        Raises:
            TypeError, ValueError: an input does not fit; the text names it. Values of tokens and
                labels are looked at on a CPU alone; elsewhere the embedding and the loss refuse
                those that are out of bounds in their own words.
        """
        if self.config.num_banks > 0 and getattr(self, "_is_replica", False):
            raise RuntimeError(
                "LM2ForCausalLM: nn.DataParallel cannot gather the memory of its replicas; use "
                "DistributedDataParallel, or one device"
            )
        self.check_inputs(input_ids, labels, memory, attention_mask)
        if bptt_segments is not None:
            check_int("LM2ForCausalLM", "bptt_segments", bptt_segments, 1)
        if use_cache:
            self.check_streaming()
        if return_logits is None:
            return_logits = labels is None
        order = lengths = None
        if attention_mask is not None:
            leave_graph(
                "LM2ForCausalLM: torch.compile(fullgraph=True) and torch.export take no "
                "attention_mask, whose values say how the tokens lie in segments; leave it out "
                "where nothing is padded"
            )
            order, lengths = compress(attention_mask)
            order = order.to(input_ids.device, non_blocking=True)
            input_ids = gather(input_ids, order)
        hidden, state = self.read(
            input_ids, memory, lengths, keep=use_cache, bptt_segments=bptt_segments
        )
        loss = None
        if labels is not None:
            if order is not None:
                number = torch.arange(labels.shape[1], device=labels.device)
                real = number < on_device(lengths, labels.device)[:, None]
                labels = gather(labels, order).masked_fill(~real, -100)
            loss = self.loss(hidden, labels)
        if return_logits and order is not None:
            hidden = spread(hidden, order, lengths)
        return LM2Output(
            logits=self.logits(hidden) if return_logits else None,
            loss=loss,
            memory=state if use_cache or self.config.num_banks > 0 else None,
        )

    if TYPE_CHECKING:
        # nn.Module's takes and returns Any
        def __call__(
            self,
            input_ids: Tensor,
            labels: Tensor | None = None,
            memory: MemoryState | None = None,
            *,
            attention_mask: Tensor | None = None,
            use_cache: bool = False,
            bptt_segments: int | None = None,
            return_logits: bool | None = None,
        ) -> LM2Output: ...

    def read(
        self,
        input_ids: Tensor,  # (B, L)
        memory: MemoryState | None = None,
        lengths: Sequence[int] | None = None,
        *,
        keep: bool = True,
        bptt_segments: int | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """The hidden states of tokens (B, L, D), and the state after them; nothing is checked.

        ``lengths``: how many tokens of each row are real, the first ones; None is all. ``keep`` is
        ``forward``'s ``use_cache``.
        """
        config = self.config
        if memory is None:
            memory = self.initial_state(input_ids.shape[0], input_ids.device)
        return run_segments(
            self.model,
            input_ids,
            memory,
            Rule(config.segment_length, config.tokens_per_slot, config.memory_causal),
            lengths,
            keep=keep,
            bptt_segments=bptt_segments,
        )

    def check_streaming(self) -> None:
        """Raise ValueError if the model cannot go on within a segment."""
        config = self.config
        is_pooled = config.formulation == "release" and config.pooled_gate == "segment"
        if is_pooled and config.num_banks > 0:
            raise ValueError(
                "LM2ForCausalLM: pooled_gate='segment' cannot stream: the released gate is a mean "
                "over the whole segment, so what a token computes depends on later tokens. Use "
                "pooled_gate='prefix' (same parameters, causal), or read whole segments with "
                "use_cache=False"
            )

    def _cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """What a state within a segment keeps of each token: (B, entries, *shape)."""
        config, shapes = self.config, {}
        heads = (config.num_key_value_heads, config.head_dim)
        for index, block in enumerate(self.model.layers):
            kept = {"self_attn.key": heads, "self_attn.value": heads}
            if block.memory is not None:
                kept |= {f"memory.{k}": v for k, v in block.memory.cache_shapes().items()}
            shapes |= {f"layers.{index}.{name}": shape for name, shape in kept.items()}
        return shapes

    generate = generate

    def save(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder, made if need be.

        An earlier model of this kind is replaced when the new one is whole.

        Args:
            folder: where to.
            state_dict: the model's own unless given (where the model is in parts).

        Raises:
            OSError: it cannot be written; what was there is as it was.
            ValueError: the folder holds a model of another kind.
        """
        config = {**self.config.to_dict(), "backend": None}
        files.save(folder, config, self.state_dict() if state_dict is None else state_dict)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> "LM2ForCausalLM":
        """The model that :meth:`save` wrote.

        Args:
            folder: where to, or the name "user/model" of a repository of the Hugging Face Hub, if
                ``huggingface_hub`` is installed.
            device: of the parameters; torch's default unless given.
            dtype: of the parameters; as saved unless given.
            backend: as of :class:`LM2Config`.
            revision: of the repository.
            token: for a repository that is not public.
            cache_dir: where the repository's files are kept.

        Raises:
            OSError: there is no such folder or file, or the Hub does not give it.
            ValueError: a file is damaged, or the weights are not the configuration's (the text
                lists all keys that are missing or too many).
        """
        place = Place(
            "LM2ForCausalLM.load", folder, revision=revision, token=token, cache_dir=cache_dir
        )
        values, tensors = files.load(place)
        config = LM2Config.from_saved({**values, "backend": backend})
        with torch.device("meta"):
            model = cls(config)
        if config.tie_word_embeddings:
            _drop_tied_head(model, tensors, "")
        files.check_keys(tensors, model.state_dict(), Path(folder) / files.WEIGHTS)
        # copies: in the file they lie at any address, and matrix products want aligned ones
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        model.load_state_dict(copies, assign=True)
        return model.to(device or torch.get_default_device(), dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits (..., V) of hidden states (..., D)."""
        if self.lm_head is not None:
            return apply_linear(hidden, self.lm_head)
        embedding = self.model.embed_tokens
        weight = embedding.weight
        if type(weight) not in ORDINARY or weight.is_meta:
            # sharded by itself or offloaded: calling the module brings it here
            ids = torch.arange(self.config.vocab_size, device=hidden.device)
            weight = embedding(ids).to(hidden.dtype)
        return F.linear(hidden, weight)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the next token by hidden states (B, L, D), some rows at a time."""
        # imports torch._dynamo, which importing the package does not wait for
        from torch.utils.checkpoint import checkpoint as recomputed  # noqa: PLC0415

        rows, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        count = (targets != -100).sum()

        dtype = torch.promote_types(hidden.dtype, torch.float32)

        def part(rows: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(rows).to(dtype), targets, reduction="sum")

        total = hidden.new_zeros((), dtype=dtype)
        for some, wanted in zip(rows.split(_LOSS_ROWS), targets.split(_LOSS_ROWS), strict=True):
            if torch.compiler.is_exporting():
                # what is exported does not train, and torch.export takes no checkpoints
                total = total + part(some, wanted)
                continue
            total = total + recomputed(
                part, some, wanted, use_reentrant=False, preserve_rng_state=False
            )
        return total / count.clamp(min=1)

    def check_inputs(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        memory: MemoryState | None,
        attention_mask: Tensor | None,
    ) -> None:
        """Raise TypeError or ValueError unless these go together and fit the model."""
        config = self.config
        for name, ids in (("input_ids", input_ids), ("labels", labels)):
            if ids is None:
                continue
            if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
                what = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
                raise TypeError(f"LM2ForCausalLM: {name} must be an int64 tensor, got {what}")
            if ids.dim() != 2 or ids.shape[1] == 0 or ids.shape != input_ids.shape:
                raise ValueError(
                    f"LM2ForCausalLM: input_ids must be (B, L) with L >= 1, and labels the same, "
                    f"got {name} {tuple(ids.shape)}"
                )
            if not _is_offloaded(self.model.embed_tokens):
                _check_device(name, ids, self.model.embed_tokens.weight.device)
            if ids.device.type != "cpu" or torch.compiler.is_compiling():
                # nobody waits for a device: there the embedding and the loss check their indices
                continue
            wrong = (ids < 0) | (ids >= config.vocab_size)
            if name == "labels":
                wrong &= ids != -100
            if wrong.any():
                raise ValueError(
                    f"LM2ForCausalLM: {name} must be below vocab_size = {config.vocab_size} and "
                    f"not negative, got {ids[wrong][0].item()}"
                )
        shape = getattr(attention_mask, "shape", type(attention_mask).__name__)
        if attention_mask is not None and shape != input_ids.shape:
            raise ValueError(
                f"LM2ForCausalLM: attention_mask must be a tensor of input_ids' shape "
                f"{tuple(input_ids.shape)}, nonzero where a token is real, got {shape}"
            )
        if attention_mask is not None and attention_mask.device.type != "cpu":
            _check_device("attention_mask", attention_mask, input_ids.device)
        if memory is None:
            return
        if not isinstance(memory, MemoryState):
            raise TypeError(
                f"LM2ForCausalLM: memory must be a MemoryState, got {type(memory).__name__}"
            )
        memory.check(
            config.num_banks,
            input_ids.shape[0],
            config.memory_slots,
            config.hidden_size,
            config.segment_length,
            config.tokens_per_slot,
        )
        memory.check_cache(self._cache_shapes())


def check_room(config: LM2Config) -> None:
    """Refuse a model whose float32 weights this machine has no memory for, before it is made.

    Raises:
        ValueError: it is too large.
    """
    with torch.device("meta"):
        try:
            model = LM2ForCausalLM(config)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"the model is too large: {str(error).splitlines()[0]}") from None
    count, there = sum(p.numel() for p in model.parameters()), machine.memory_bytes()
    if 4 * count > there:
        raise ValueError(
            f"a model of {count:,} parameters takes {4e-9 * count:.1f} GB, and this machine has "
            f"{1e-9 * there:.1f} GB (vocab_size {config.vocab_size}, hidden_size "
            f"{config.hidden_size})"
        )


def _is_offloaded(module: nn.Module) -> bool:
    """Whether somebody brings the weight when the module is called."""
    is_watched = "forward" in module.__dict__ or bool(module._forward_pre_hooks)
    return module.weight.is_meta and is_watched


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"LM2ForCausalLM: {name} is on {tensor.device}, but must be on {device}; move it"
        )


def _drop_tied_head(module: LM2ForCausalLM, state_dict: dict, prefix: str, *_: object) -> None:
    """Accept checkpoints that hold the tied embedding under both its names."""
    head = state_dict.pop(f"{prefix}lm_head.weight", None)
    embedding = state_dict.get(f"{prefix}model.embed_tokens.weight")
    if head is None or embedding is None or head is embedding:
        return
    if not torch.equal(head, embedding):
        raise ValueError(
            "LM2ForCausalLM: lm_head.weight differs from model.embed_tokens.weight, but the "
            "configuration ties them (tie_word_embeddings)"
        )
