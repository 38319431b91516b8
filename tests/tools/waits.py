"""Counts what makes the host wait for its device.

Tensors on ``meta`` stand for those of a GPU: they have shapes, and no values that anybody could
read without asking the device.
"""

import contextlib
import traceback
from collections.abc import Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lm2_kernels import autograd, use_backend

aten = torch.ops.aten
DEVICE = torch.device("meta")

# operators whose result on the host, or whose shape, is in the values
_READ = {
    aten._local_scalar_dense.default: "item",
    aten.is_nonzero.default: "bool",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten._unique2.default: "unique",
    # with checks of values in some releases
    aten.multinomial.default: "multinomial",
}


class Waits(TorchDispatchMode):
    """Records each wait as what it was and where in the package.

    Args:
        answer: what a value is that is read.
    """

    def __init__(self, answer: int = 0):
        super().__init__()
        self.answer = answer
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        what = _READ.get(func)
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if what is not None and any(t.device == DEVICE for t in tensors):
            self.add(what)
        if func is aten._local_scalar_dense.default and tensors[0].device == DEVICE:
            return torch.tensor(self.answer).to(tensors[0].dtype).item()
        if func is aten._to_copy.default:
            target = torch.device(kwargs.get("device") or args[0].device)
            if (args[0].device == DEVICE) != (target == DEVICE):
                if target != DEVICE or not kwargs.get("non_blocking"):
                    self.add(f"copy to {target.type}")
                if target != DEVICE:
                    return torch.full(args[0].shape, self.answer, dtype=args[0].dtype)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            indices = [i for i in args[1] if i is not None]
            if any(i.device == DEVICE and i.dtype in (torch.bool, torch.uint8) for i in indices):
                self.add("index of a mask")
            if args[0].device != DEVICE and any(i.device == DEVICE for i in indices):
                self.add("index on the device")
        return func(*args, **kwargs)

    def add(self, what: str) -> None:
        own = [f for f in traceback.extract_stack() if "/lm2_kernels/" in f.filename]
        place = f"{own[-1].filename.rpartition('/')[2]}:{own[-1].lineno}" if own else "elsewhere"
        self.found.append(f"{what} in {place}")


@contextlib.contextmanager
def counted(answer: int = 0) -> Iterator[list[str]]:
    """Everything that waits, of what runs on ``DEVICE`` in the block.

    The ops are their operators' shape functions: kernels wait for nothing.
    """

    def run(backend: str, function: str, *args):
        return getattr(torch.ops.lm2_kernels, function)(*args, backend)

    autocast, tensor, waits = torch.autocast, torch.tensor, Waits(answer)

    def tensor_there(data, *, device=None, **options):
        # a copy that is waited for, of which no operator tells
        if device is not None and torch.device(device) == DEVICE:
            waits.add("tensor")
        return tensor(data, device=device, **options)

    def autocast_but_there(device_type: str, *args, **options):
        if device_type == DEVICE.type:
            return contextlib.nullcontext()
        return autocast(device_type, *args, **options)

    with (
        mock.patch.object(autograd, "run", run),
        mock.patch.object(torch, "autocast", autocast_but_there),
        mock.patch.object(torch, "tensor", tensor_there),
        use_backend("eager"),
        waits,
    ):
        yield waits.found
