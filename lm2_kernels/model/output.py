"""What the language model returns: by attributes, as a dict and as a tuple."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lm2_kernels.state.memory import MemoryState

_NAMES = ("loss", "logits", "memory")


# ordered, as a dict that FSDP and others make anew as what it was
class LM2Output(OrderedDict[str, Tensor | MemoryState]):
    """What :class:`LM2ForCausalLM` returns.

    ``output.loss`` is ``output["loss"]``; the keys are those of values that are not None. Numbers
    and slices take from ``to_tuple()``: ``output[0]`` is the loss where there are labels. So do the
    outputs of transformers, whose Trainer takes these.

    Args:
        loss: see :attr:`loss`; or a dict of all, or its pairs.
        logits: see :attr:`logits`.
        memory: see :attr:`memory`.
    """

    def __init__(
        self,
        loss: Tensor | Mapping[str, Tensor | MemoryState] | Iterable[tuple] | None = None,
        logits: Tensor | None = None,
        memory: MemoryState | None = None,
    ):
        values = {"loss": loss, "logits": logits, "memory": memory}
        if not (loss is None or isinstance(loss, Tensor)):
            # who walks through dicts makes them anew like this, DataParallel from pairs
            values = dict(loss)
        super().__init__({name: value for name, value in values.items() if value is not None})

    @property
    def loss(self) -> Tensor | None:
        """The mean over labels[:, 1:] that are not -100, 0 without any; float32 at least."""
        return self.get("loss")  # type: ignore[return-value]

    @property
    def logits(self) -> Tensor | None:
        """(B, L, V); None where a loss was asked for and logits were not."""
        return self.get("logits")  # type: ignore[return-value]

    @property
    def memory(self) -> MemoryState | None:
        """The state; None for a model without memory layers, unless ``use_cache`` was given."""
        return self.get("memory")  # type: ignore[return-value]

    def to_tuple(self) -> tuple[Tensor | MemoryState, ...]:
        """The values that are not None: loss, logits, memory."""
        return tuple(self.values())

    def __getitem__(self, key):
        if isinstance(key, str):
            return super().__getitem__(key)
        return self.to_tuple()[key]

    def __setattr__(self, name: str, value: Tensor | MemoryState | None) -> None:
        if name not in _NAMES:
            raise AttributeError(f"LM2Output has {', '.join(_NAMES)}, and no {name!r}")
        values = {key: self.get(key) for key in _NAMES} | {name: value}
        # anew, for their order
        self.clear()
        self.update({key: value for key, value in values.items() if value is not None})

    def __reduce__(self):
        return type(self), tuple(self.get(name) for name in _NAMES)


# for torch.export, FSDP, and whoever else walks through outputs
pytree.register_pytree_node(
    LM2Output,
    lambda output: ([output.get(name) for name in _NAMES], None),
    lambda values, _: LM2Output(*values),
    serialized_type_name="lm2_kernels.LM2Output",
    flatten_with_keys_fn=lambda output: (
        [(pytree.MappingKey(name), output.get(name)) for name in _NAMES],
        None,
    ),
)
torch.serialization.add_safe_globals([LM2Output])
