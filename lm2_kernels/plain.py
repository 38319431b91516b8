"""When a submodule's own call may be replaced by a kernel that computes the same."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

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
    if (
        type(module) is not kind
        or kind.forward is not _FORWARD[kind]
        or kind.__call__ is not _CALL
        or kind._call_impl is not _CALL_IMPL
        or F.linear is not _LINEAR
        or F.layer_norm is not _LAYER_NORM
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
        or _is_watched()
    ):
        return None
    # as module.weight finds them: FSDP1 sets plain attributes
    own, parameters = module.__dict__, module._parameters
    weight = own["weight"] if "weight" in own else parameters.get("weight")
    bias = own["bias"] if "bias" in own else parameters.get("bias", _MISSING)
    if _is_ordinary(weight) and (bias is None or _is_ordinary(bias)):
        return weight, bias
    return None


def _is_ordinary(parameter: object) -> bool:
    return type(parameter) in ORDINARY and parameter.layout == torch.strided


def _is_watched() -> bool:
    """Whether a mode sees every function of torch; that of a default device changes none of these.

    Not while torch.compile traces, which has modes of its own.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_function_stack() == 0:
        return False
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
