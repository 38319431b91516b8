"""Exact, fast LM2 memory layers for PyTorch (Large Memory Models, arXiv 2502.06049)."""

from lm2_kernels import operators as _operators  # noqa: F401 - registers them for torch.compile
from lm2_kernels import reference
from lm2_kernels.backends import recording, use_backend
from lm2_kernels.functional import initial_memory, memory_attention, memory_update
from lm2_kernels.layers import PaperMemory, ReleaseMemory
from lm2_kernels.model import (
    Generated,
    LM2Config,
    LM2ForCausalLM,
    LM2Output,
    release_state_dict,
)
from lm2_kernels.patching import add_memory, get_memory, load_memory, remove_memory, swap_memory
from lm2_kernels.state import MemoryState
from lm2_kernels.version import __version__

__all__ = [
    "Generated",
    "LM2Config",
    "LM2ForCausalLM",
    "LM2Output",
    "MemoryState",
    "PaperMemory",
    "ReleaseMemory",
    "__version__",
    "add_memory",
    "get_memory",
    "initial_memory",
    "load_memory",
    "memory_attention",
    "memory_update",
    "recording",
    "reference",
    "release_state_dict",
    "remove_memory",
    "swap_memory",
    "use_backend",
]
