"""Our layer in the place of the released implementation's."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lm2_kernels.layers.release import ReleaseMemory
from lm2_kernels.patching.report import Report, report_on

# what a memory module of the released implementation has
_RELEASED = (
    "query_proj",
    "key_proj",
    "value_proj",
    "attention_mlp",
    "attended_memory_layernorm",
    "attended_memory_layernorm2",
    "input_gate_projector",
    "memory_gate_projector",
    "input_bias",
    "forget_bias",
)


class SwappedMemory(ReleaseMemory):
    """:class:`ReleaseMemory` with the released module's call."""

    def forward(
        self,
        inputs: Tensor,  # (B, T, D)
        memory: Tensor,  # (B, N, D)
        attention_mask: Tensor | None = None,  # broadcasts to (B, H, T, N)
    ) -> tuple[Tensor, Tensor]:
        """The output (B, T, D) and the new memory (B, N, D).

        ``attention_mask`` is nonzero where a token does not see a slot. Slots of later tokens are
        hidden anyway; of the others each must be hidden from all tokens or from none.
        """
        slot_mask = None
        if attention_mask is not None:
            shape = (inputs.shape[0], self.num_heads, inputs.shape[1], memory.shape[1])
            hidden = attention_mask.bool().broadcast_to(shape)
            of_last = hidden[:, 0, -1]
            causal = torch.ones(shape[2:], dtype=torch.bool, device=hidden.device).tril()
            if ((hidden != of_last[:, None, None]) & causal).any():
                raise ValueError(
                    "swap_memory: attention_mask must hide a slot from all tokens or from none, "
                    "and hide nothing else but the slots of later tokens"
                )
            slot_mask = ~of_last
        return super().forward(inputs.flatten(2), memory, slot_mask=slot_mask)


def _released_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        is_ours = isinstance(module, ReleaseMemory)
        if not is_ours and all(hasattr(module, attribute) for attribute in _RELEASED):
            yield name, module


def replace_modules(model: nn.Module, new: dict[int, nn.Module]) -> None:
    """Put modules in the places of others, wherever these are registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[name] = new[id(child)]


def swap_memory(model: nn.Module, *, backend: str | None = None) -> Report:
    """Replace every memory module of the released implementation by ours, in place.

    They are found by their parts, whatever their class. Ours takes the same arguments, returns the
    same, and holds the same ``Parameter`` objects under the same names: optimisers and checkpoints
    go on. It computes the same to rounding, but where a token sees no slot: 0 instead of NaN.

    Args:
        model: holds the modules.
        backend: of our layers; None takes the default (``use_backend``).

    Raises:
        ValueError: there is no such module, or one has an option that ours lacks; the model is
            unchanged.
    """
    found = dict(_released_modules(model))
    if not found:
        raise ValueError(
            f"swap_memory: {type(model).__name__} has no memory module of the released "
            f"implementation (or no more): looked for a module with {', '.join(_RELEASED)}"
        )
    if "" in found:
        raise ValueError(
            "swap_memory: the model itself is a memory module, which cannot be replaced in place; "
            "use ReleaseMemory with its state dict"
        )
    new = {id(module): _swapped(name, module, backend) for name, module in found.items()}
    replace_modules(model, new)
    return report_on("swapped", model, list(found))


def share_parameters(source: nn.Module, target: nn.Module) -> None:
    """Put one module's parameters in the places of another's, which have the same names."""
    for name, parameter in list(source.named_parameters()):
        prefix, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(prefix), leaf, parameter)


def _swapped(name: str, module: nn.Module, backend: str | None) -> SwappedMemory:
    """Ours for a released module, with its parameters, or ValueError."""

    def refuse(why: str) -> ValueError:
        return ValueError(f"swap_memory: {name} {why}, which ReleaseMemory does not reproduce")

    for option in ("n_heads", "num_blocks", "use_topk", "topk", "attn_drop"):
        if not hasattr(module, option):
            raise refuse(f"has no attribute {option!r}")
    norms = (module.attended_memory_layernorm, module.attended_memory_layernorm2)
    if len(set(module.attention_mlp)) != 1:
        raise refuse("has an attention_mlp of several Linear layers instead of one shared")
    if norms[0].eps != norms[1].eps:
        raise refuse("has two values of epsilon in its layer norms")
    if module.use_topk and module.attn_drop.p > 0.0:
        raise refuse("drops out before top-k (set attn_drop.p to 0)")
    for part in module.modules():
        hooks = (part._forward_hooks, part._forward_pre_hooks)
        if any((*hooks, part._backward_hooks, part._backward_pre_hooks)):
            raise refuse("has hooks")
    swapped = SwappedMemory(
        module.query_proj.in_features,
        module.n_heads,
        num_blocks=module.num_blocks,
        attention_mlp_layers=len(module.attention_mlp),
        top_k=module.topk if module.use_topk else None,
        dropout=module.attn_drop.p,
        eps=norms[0].eps,
        backend=backend,
        device="meta",
    )
    # of one number, () is as good as (1,)
    wanted, got = (
        {name: tuple(p.shape) or (1,) for name, p in m.named_parameters()}
        for m in (swapped, module)
    )
    if wanted != got:
        raise refuse(f"has other parameters: {sorted(set(wanted.items()) ^ set(got.items()))}")
    share_parameters(module, swapped)
    # optimisers number the parameters in the order in which a model lists them
    for own, theirs in (
        (swapped._parameters, module._parameters),
        (swapped._modules, module._modules),
    ):
        for key in [key for key in theirs if key in own]:
            own[key] = own.pop(key)
    # in a tuple: not a submodule
    swapped.released = (module,)
    return swapped.train(module.training)
