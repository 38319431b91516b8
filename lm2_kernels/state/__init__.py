"""The memory between calls: banks, what is kept within a segment, files."""

from lm2_kernels.state.cache import SegmentCache
from lm2_kernels.state.memory import MemoryState

__all__ = ["MemoryState", "SegmentCache"]
