"""The memory layers, as ``nn.Module``."""

from lm2_kernels.layers.paper import PaperMemory
from lm2_kernels.layers.release import ReleaseMemory

__all__ = ["PaperMemory", "ReleaseMemory"]
