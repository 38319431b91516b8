"""The sizes and options of the reference language model."""

import dataclasses
from collections.abc import Mapping

from lm2_kernels.backends import check_choice
from lm2_kernels.checks import check_bool, check_dropout, check_eps, check_int, check_scale
from lm2_kernels.layers.start import check_start


@dataclasses.dataclass(frozen=True)
class LM2Config:
    """The sizes and options of :class:`LM2ForCausalLM`.

    Args:
        vocab_size: number of tokens.
        hidden_size: width D.
        intermediate_size: width of the MLP.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads of the self-attention.
        num_key_value_heads: its key and value heads, which groups of query heads share;
            ``num_attention_heads`` unless given.
        rms_norm_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary position embedding.
        tie_word_embeddings: whether the output projection is the token embedding.
        memory_slots: slots N of a bank, and the most tokens of a segment.
        memory_heads: heads of the memory attention.
        memory_layers: which blocks have a memory layer; None is all, () none.
        formulation: "paper" (:class:`PaperMemory`) or "release" (:class:`ReleaseMemory`).
        flow: "depth": one bank runs through the blocks, and the last one's starts the next segment
            (released). "time": every block has a bank of its own, carried from segment to segment.
        pooled_gate: of the release formulation, "prefix" (causal) or "segment" (released).
        memory_init: what a bank starts from: "identity", "zeros" (release formulation alone) or
            "learned" (initially the identity).
        memory_dropout: on the memory attention's probabilities, while training.
        memory_recompute: whether the memory layers keep their inputs alone for backward and compute
            the rest again (``recompute`` of :class:`PaperMemory`).
        zero_init: initialise the memory layers so that the model computes what it computes without
            them: the paper formulation's values start at 0; the release formulation's second
            LayerNorm does, and ``memory_init`` must be "zeros": it then learns from sequences of
            several segments, its bias first.
        initializer_range: standard deviation of the initial weights.
        backend: of the memory layers; None takes the default (``use_backend``).

    Raises:
        TypeError, ValueError: a size or option does not fit.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    tie_word_embeddings: bool = False
    memory_slots: int = 2048
    memory_heads: int = 8
    memory_layers: tuple[int, ...] | None = None
    formulation: str = "paper"
    flow: str = "depth"
    pooled_gate: str = "prefix"
    memory_init: str = "identity"
    memory_dropout: float = 0.0
    memory_recompute: bool = False
    zero_init: bool = False
    initializer_range: float = 0.02
    backend: str | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        for name in (*sizes, "num_attention_heads", "memory_slots", "memory_heads"):
            check_int("LM2Config", name, getattr(self, name), 1)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        check_int("LM2Config", "num_key_value_heads", self.num_key_value_heads, 1)
        check_bool("LM2Config", "tie_word_embeddings", self.tie_word_embeddings)
        check_bool("LM2Config", "zero_init", self.zero_init)
        check_bool("LM2Config", "memory_recompute", self.memory_recompute)
        check_eps("LM2Config", self.rms_norm_eps)
        check_dropout("LM2Config", self.memory_dropout)
        if self.backend is not None:
            check_choice(self.backend)
        for name in ("rope_theta", "initializer_range"):
            check_scale("LM2Config", getattr(self, name))
            if getattr(self, name) <= 0.0:
                raise ValueError(f"LM2Config: {name} must be above 0, got {getattr(self, name)!r}")
        if self.memory_layers is None:
            object.__setattr__(self, "memory_layers", tuple(range(self.num_hidden_layers)))
        object.__setattr__(self, "memory_layers", tuple(self.memory_layers))
        divisors = [
            ("hidden_size", "num_attention_heads"),
            ("num_attention_heads", "num_key_value_heads"),
        ]
        if self.memory_layers:
            divisors.append(("hidden_size", "memory_heads"))
        for whole, part in divisors:
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"LM2Config: {part} ({getattr(self, part)}) must divide {whole} "
                    f"({getattr(self, whole)})"
                )
        if self.head_dim % 2:
            raise ValueError(
                f"LM2Config: hidden_size / num_attention_heads must be even for rotary "
                f"embeddings, got {self.head_dim}"
            )
        for layer in self.memory_layers:
            check_int("LM2Config", "memory_layers", layer, 0)
            if layer >= self.num_hidden_layers:
                raise ValueError(
                    f"LM2Config: memory_layers has {layer}, but the blocks are 0 to "
                    f"{self.num_hidden_layers - 1}"
                )
        if list(self.memory_layers) != sorted(set(self.memory_layers)):
            raise ValueError(
                f"LM2Config: memory_layers must ascend without repeats, got {self.memory_layers}"
            )
        for name, choices in (("flow", ("depth", "time")), ("pooled_gate", ("prefix", "segment"))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"LM2Config: {name} must be one of {choices}, got {getattr(self, name)!r}"
                )
        inits = ("identity", "zeros", "learned")
        check_start("LM2Config", self.formulation, self.memory_init, self.zero_init, inits)

    @classmethod
    def published(cls, **changes: object) -> "LM2Config":
        """The sizes of the paper's model: Llama-3.2-1B's, a memory layer in each of 16 blocks.

        Not for Llama-3.2's weights: those want scaled rotary frequencies, which are not here.
        """
        sizes = {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
            "memory_slots": 2048,
            "memory_heads": 32,
        }
        return cls(**{**sizes, **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "LM2Config":
        """A configuration from ``dataclasses.asdict``'s dict, or the same by way of JSON.

        Raises:
            ValueError: a name is unknown or missing; TypeError, ValueError: a value does not fit.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
        missing = sorted(required - set(values))
        if unknown or missing:
            raise ValueError(f"LM2Config: unknown options {unknown}, missing options {missing}")
        return cls(**values)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_banks(self) -> int:
        """How many banks a state has."""
        return min(1, len(self.memory_layers)) if self.flow == "depth" else len(self.memory_layers)
