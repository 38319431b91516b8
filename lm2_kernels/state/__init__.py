"""The memory between calls: banks, what is kept within a segment, files."""

from lm2_kernels.state.memory import MemoryState, SegmentCache

__all__ = ["MemoryState", "SegmentCache"]
