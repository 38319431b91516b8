"""The sizes and options of the reference language model."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import ClassVar

from lm2_kernels.backends import check_choice
from lm2_kernels.checks import check_bool, check_int
from lm2_kernels.layers.base import check_write, default_causal
from lm2_kernels.layers.start import check_segments, check_start, tokens_bound

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "memory_slots",
    "memory_heads",
)
# what earlier versions did not say of a model: it was always so
_UNSAID = {"candidate": "read"}
# beyond it torch counts elements wrongly or not at all
_LARGEST = 2**31 - 1
_MOST_BLOCKS = 2**16


# the fields are frozen by hand, and the hash is by them: see __setattr__
@dataclasses.dataclass(unsafe_hash=True)
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
        memory_slots: slots N of a bank.
        segment_length: the most tokens S of a segment, which is its own self-attention window and
            reads the memory as the segment found it; ``memory_slots`` unless given, which for
            ``write="chunk"`` is a chunk of one token. As ``memory_causal`` it is filled in:
            ``dataclasses.replace`` keeps what it was.
        memory_heads: heads of the memory attention.
        memory_layers: which blocks have a memory layer; None is all, () none.
        formulation: "paper" (:class:`PaperMemory`) or "release" (:class:`ReleaseMemory`).
        flow: "depth": one bank runs through the blocks, and the last one's starts the next segment
            (released). "time": every block has a bank of its own, carried from segment to segment.
        write: "position": each token of a segment rewrites a slot of its own, so that
            ``segment_length`` is at most ``memory_slots``. "chunk": each slot is rewritten by S / N
            neighbouring tokens, a whole number; needs ``flow="time"``.
        memory_causal: whether a token sees the slots up to its own alone; None is True for
            "position" and False for "chunk", which refuses True. False needs ``flow="time"``.
        candidate: what is written: "token", what was read and a term of the token, or "read", LM2's
            own, which in small models learns to remember later (docs/study.md).
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
    segment_length: int | None = None
    memory_heads: int = 8
    memory_layers: tuple[int, ...] | None = None
    formulation: str = "paper"
    flow: str = "depth"
    write: str = "position"
    memory_causal: bool | None = None
    candidate: str = "token"
    pooled_gate: str = "prefix"
    memory_init: str = "identity"
    memory_dropout: float = 0.0
    memory_recompute: bool = False
    zero_init: bool = False
    initializer_range: float = 0.02
    backend: str | None = None

    # what transformers' Trainer reads of a configuration; no options of the model
    use_cache: ClassVar[bool] = False
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["memory"]

    def __post_init__(self):
        for name in _SIZES:
            high = _MOST_BLOCKS if name == "num_hidden_layers" else _LARGEST
            check_int("LM2Config", name, getattr(self, name), 1, high)
        if self.num_key_value_heads is None:
            self._normalise("num_key_value_heads", self.num_attention_heads)
        check_int("LM2Config", "num_key_value_heads", self.num_key_value_heads, 1, _LARGEST)
        if self.segment_length is None:
            self._normalise("segment_length", self.memory_slots)
        check_int("LM2Config", "segment_length", self.segment_length, 1, _LARGEST)
        if self.memory_causal is None:
            self._normalise("memory_causal", default_causal(self.write))
        for name in ("tie_word_embeddings", "zero_init", "memory_recompute", "memory_causal"):
            check_bool("LM2Config", name, getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta", "initializer_range", "memory_dropout"):
            self._check_number(name)
        if self.backend is not None:
            if not isinstance(self.backend, str):
                raise TypeError(
                    f"LM2Config: backend must be a str or None, got {type(self.backend).__name__}"
                )
            check_choice(self.backend)
        if self.memory_layers is None:
            self._normalise("memory_layers", tuple(range(self.num_hidden_layers)))
        if not isinstance(self.memory_layers, list | tuple | range):
            raise TypeError(
                f"LM2Config: memory_layers must be a list of ints, or None, got "
                f"{type(self.memory_layers).__name__} {self.memory_layers!r}"
            )
        self._normalise("memory_layers", tuple(self.memory_layers))
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
            check_int("LM2Config", "a number in memory_layers", layer, 0)
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
        self._check_write()
        inits = ("identity", "zeros", "learned")
        check_start("LM2Config", self.formulation, self.memory_init, self.zero_init, inits)

    def _check_write(self) -> None:
        """What is written and what is seen go together, and with the flow."""
        op, has_memory = "LM2Config", bool(self.memory_layers)
        if has_memory:
            check_segments(op, self.memory_slots, self.segment_length, self.write)
        check_write(op, self.write, self.tokens_per_slot, self.memory_causal, self.candidate)
        if has_memory and self.flow == "depth" and not self.memory_causal:
            what = "write='chunk'" if self.write == "chunk" else "memory_causal=False"
            raise ValueError(
                f"LM2Config: {what} needs flow='time': in flow 'depth' a bank comes from the block "
                f"below, where later tokens of the same segment have written to it"
            )

    def __setstate__(self, state: dict[str, object]) -> None:
        # of pickles from before there were such options
        old = {"segment_length": state["memory_slots"], "memory_causal": True}
        self.__dict__.update(_UNSAID | old | state)

    def __setattr__(self, name: str, value: object) -> None:
        # other names are free, for programs that keep notes on a model's configuration
        if name in self.__dict__ and any(f.name == name for f in dataclasses.fields(self)):
            raise dataclasses.FrozenInstanceError(f"LM2Config: {name} is fixed; make another")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if any(field.name == name for field in dataclasses.fields(self)):
            raise dataclasses.FrozenInstanceError(f"LM2Config: {name} is fixed; make another")
        super().__delattr__(name)

    def _normalise(self, name: str, value: object) -> None:
        self.__dict__[name] = value

    def _check_number(self, name: str) -> None:
        """A finite number above 0; a probability is below 1 and may be 0."""
        value, is_share = getattr(self, name), name == "memory_dropout"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"LM2Config: {name} must be a float, got {type(value).__name__}")
        if not (0.0 <= value < 1.0 if is_share else 0.0 < value < sys.float_info.max):
            wanted = "in [0, 1)" if is_share else "above 0 and finite"
            raise ValueError(f"LM2Config: {name} must be {wanted}, got {value!r}")

    @classmethod
    def published(cls, **changes: object) -> "LM2Config":
        """The paper's model: Llama-3.2-1B's sizes, a memory layer in each of 16 blocks.

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
            "candidate": "read",
        }
        return cls(**{**sizes, **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "LM2Config":
        """A configuration from :meth:`to_dict`'s dict, or the same by way of JSON.

        Raises:
            ValueError: a name is unknown or missing; TypeError, ValueError: a value does not fit.
        """
        if not isinstance(values, Mapping):
            raise TypeError(
                f"LM2Config: the options must be a dict, got {type(values).__name__} {values!r}"
            )
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields), key=str)
        required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
        missing = sorted(required - set(values))
        if unknown or missing:
            raise ValueError(f"LM2Config: unknown options {unknown}, missing options {missing}")
        return cls(**values)

    @classmethod
    def from_saved(cls, values: Mapping[str, object]) -> "LM2Config":
        """:meth:`from_dict` for a model that was saved, perhaps by an earlier version.

        What that did not know is as it was, and not as it is of new models.
        """
        return cls.from_dict({**_UNSAID, **values} if isinstance(values, Mapping) else values)

    def to_dict(self) -> dict[str, object]:
        """The options by their names."""
        return dataclasses.asdict(self)

    def to_json_string(self) -> str:
        """The options as JSON."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def tokens_per_slot(self) -> int:
        """How many tokens of a segment are bound to a slot."""
        return tokens_bound(self.memory_slots, self.segment_length, self.write)

    @property
    def num_banks(self) -> int:
        """How many banks a state has."""
        return min(1, len(self.memory_layers)) if self.flow == "depth" else len(self.memory_layers)
