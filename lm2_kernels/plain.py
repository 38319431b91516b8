"""When a submodule's own call may be replaced by a kernel that computes the same."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

# as PyTorch defines them: what calling a module runs, and the functions that it ends in
_CALL = nn.Module.__call__
_FORWARD = {nn.Linear: nn.Linear.forward, nn.LayerNorm: nn.LayerNorm.forward}
_LINEAR, _LAYER_NORM = F.linear, F.layer_norm
# what functional_call puts in a parameter's place is a plain tensor
ORDINARY = (nn.Parameter, Tensor)


def plain_parameters(
    module: nn.Module, kind: type[nn.Module]
) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a submodule that nobody can tell was not called; else None.

    Somebody could if it is not exactly ``kind``, if it or every module has hooks, if its class, the
    instance or the function behind both was patched, if it was compiled by itself, or if its
    parameters are not ordinary tensors of its own (pruned, parametrised, sharded, quantised). They
    may be on any device and of any dtype: whoever moves or casts them when the module is called has
    left one of these traces.

    Args:
        module: the submodule.
        kind: ``nn.Linear`` or ``nn.LayerNorm``.
    """
    if (
        type(module) is not kind
        or kind.forward is not _FORWARD[kind]
        or kind.__call__ is not _CALL
        or F.linear is not _LINEAR
        or F.layer_norm is not _LAYER_NORM
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    ):
        return None
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(weight) in ORDINARY and (bias is None or type(bias) in ORDINARY):
        return weight, bias
    return None
