"""When a submodule's own call may be replaced by a kernel that computes the same."""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# as PyTorch defines them: what calling a module runs, and the functions that it ends in
_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl
_FORWARD = {nn.Linear: nn.Linear.forward, nn.LayerNorm: nn.LayerNorm.forward}
_LINEAR, _LAYER_NORM = F.linear, F.layer_norm
# what functional_call puts in a parameter's place is a plain tensor
ORDINARY = (nn.Parameter, Tensor)
_MISSING = object()


def plain_parameters(
    module: nn.Module, kind: type[nn.Module]
) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a submodule that nobody can tell was not called; else None.

    Somebody could if it is not exactly ``kind``, if it or every module has hooks, if its class, the
    instance or the function behind both was patched or is watched by a mode, if it was compiled by
    itself, or if its parameters are not ordinary tensors of its own (pruned, parametrised, sharded,
    quantised, sparse). They may be on any device and of any dtype: whoever moves or casts them when
    the module is called has left one of these traces.

    Args:
        module: the submodule.
        kind: ``nn.Linear`` or ``nn.LayerNorm``.
    """
    return parameters_of_plain(module, kind) if calls_are_plain() else None


def calls_are_plain() -> bool:
    """Whether nobody watches all modules, or the functions that Linear and LayerNorm end in."""
    return (
        nn.Module.__call__ is _CALL
        and nn.Module._call_impl is _CALL_IMPL
        and F.linear is _LINEAR
        and F.layer_norm is _LAYER_NORM
        and not _has_any_global_hook()
        and not _is_watched()
    )


def parameters_of_plain(
    module: nn.Module, kind: type[nn.Module]
) -> tuple[Tensor, Tensor | None] | None:
    """:func:`plain_parameters` where :func:`calls_are_plain`."""
    if type(module) is not kind or kind.forward is not _FORWARD[kind] or not is_plain(module):
        return None
    # as module.weight finds them: FSDP1 sets plain attributes
    own, parameters = module.__dict__, module._parameters
    weight = own["weight"] if "weight" in own else parameters.get("weight")
    bias = own["bias"] if "bias" in own else parameters.get("bias", _MISSING)
    if is_ordinary(weight) and (bias is None or is_ordinary(bias)):
        return weight, bias
    return None


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else, of what it has itself."""
    kind, own = type(module), module.__dict__
    return (
        kind.__call__ is _CALL
        and kind._call_impl is _CALL_IMPL
        and "forward" not in own
        and module._compiled_call_impl is None
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
    )


def is_ordinary(tensor: object) -> bool:
    """Whether a parameter, or an input, is a dense tensor of no class of its own; a fake one is."""
    is_known = type(tensor) in ORDINARY or type(tensor) is _fake("FakeTensor")
    return is_known and tensor.layout == torch.strided


def ops_are_watched() -> bool:
    """Whether a mode sees every operator; one that computes shapes alone changes none of these."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    fake = _fake("FakeTensorMode")
    return any(type(mode) is not fake for mode in _get_current_dispatch_mode_stack())


def _fake(name: str) -> type | None:
    """A class of PyTorch's fake tensors; None where nobody has imported them, which takes long."""
    return getattr(sys.modules.get("torch._subclasses.fake_tensor"), name, None)


def _is_watched() -> bool:
    """Whether a mode sees every function of torch; that of a default device changes none of these.

    Not while torch.compile traces, which has modes of its own.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_function_stack() == 0:
        return False
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
