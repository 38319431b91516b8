"""The fingerprint of a model's weights, by which a cache knows whose it is."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lm2_kernels.patching.adapters import ADAPTER

# numbers of each tensor that count, about
_SAMPLES = 64


def fingerprint(module: nn.Module, note: str = "") -> str:
    """Of what a module computes with, from some numbers of each of its tensors.

    Modules with other weights have another, in another dtype too. Wherever weights are, offloaded
    or not, it is the same; and so it is for what PEFT wrapped and for what it leaves when it is
    unloaded or merged: of its adapters those count that are active and not merged, whatever they
    are called.

    Args:
        module: the host's decoder, which has the memory layers within.
        note: what else is to be the same.
    """
    samples = hashlib.sha256(note.encode())
    for name, tensor in _weights(module, ""):
        samples.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        for plain in _plain(tensor):
            flat = plain.detach().reshape(-1)
            # odd, so that not all are of one column
            some = flat[:: (flat.numel() // _SAMPLES) | 1].contiguous()
            samples.update(bytes(some.view(torch.uint8).tolist()))
    return samples.hexdigest()


def _weights(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a state dict has, by the names that they have without PEFT."""
    # not state_dict itself, which gathers or converts what is sharded or quantised
    if hasattr(module, ADAPTER):
        yield from _adapted(module, prefix)
        return
    own = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
    for name, tensor in {**module._parameters, **own}.items():
        if tensor is not None:
            yield prefix + name, _offloaded(module, name, tensor) if tensor.is_meta else tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from _weights(child, f"{prefix}{name}.")


def _adapted(wrapper: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Those of a module that PEFT put in the place of another: what it computes with now."""
    active, merged = wrapper.active_adapter, getattr(wrapper, "merged_adapters", ())
    active = [active] if isinstance(active, str) else active
    active = [] if wrapper.disable_adapters else [name for name in active if name not in merged]
    copies = wrapper._modules.get("modules_to_save", {})
    wrapped = next((copies[name] for name in active if name in copies), None)
    for name, child in wrapper._modules.items():
        if name in ("base_layer", "original_module") and child is not None:
            yield from _weights(child if wrapped is None else wrapped, prefix)
        elif name == "token_adapter":
            yield from _weights(child, prefix)
        elif name in wrapper.adapter_layer_names and child is not copies:
            for number, adapter in enumerate(a for a in active if a in child):
                own, place = child[adapter], f"{prefix}{name}.{number}"
                yield from [(place, own)] if isinstance(own, Tensor) else _weights(own, f"{place}.")
    scaling = getattr(wrapper, "scaling", None)
    if isinstance(scaling, Mapping):
        numbers = [float(scaling[name]) for name in active if name in scaling]
        if numbers:
            yield f"{prefix}scaling", torch.tensor(numbers, device="cpu")


def _offloaded(module: nn.Module, name: str, meta: Tensor) -> Tensor:
    """A weight of which the module has no numbers: accelerate's hook may have them."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        weights = (getattr(each, "weights_map", None) or {}).get(name)
        if weights is not None:
            return weights
    return meta


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors of which one is made: of shards those that are here."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        for part in parts:
            # a shard's mesh is a part too
            yield from _plain(part) if isinstance(part, Tensor) else ()
    elif not tensor.is_meta and tensor.layout == torch.strided:
        yield tensor
