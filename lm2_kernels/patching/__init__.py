"""Memory layers in models that others wrote, by patching the instance.

:func:`add_memory` puts a memory layer behind the self-attention of the blocks of a decoder of
``transformers``, found by its structure (:class:`Host`). A forward hook on the self-attention does
it, so the host's code stays as it is; hooks on the decoder that owns the blocks see each pass begin
and end, and tie the memory to the host's key/value cache. :func:`swap_memory` puts our layer in the
place of the released implementation's. :func:`remove_memory` undoes both. ``transformers`` is never
imported.
"""

from lm2_kernels.patching.add import add_memory, get_memory, load_memory, remove_memory
from lm2_kernels.patching.follow import AddedMemory
from lm2_kernels.patching.hosts import HOSTS, Host
from lm2_kernels.patching.report import Report
from lm2_kernels.patching.swap import swap_memory

__all__ = [
    "HOSTS",
    "AddedMemory",
    "Host",
    "Report",
    "add_memory",
    "get_memory",
    "load_memory",
    "remove_memory",
    "swap_memory",
]
