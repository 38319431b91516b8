"""The released model's checkpoints."""

import torch
from torch import Tensor


def release_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released model's checkpoint under the names of :class:`LM2ForCausalLM`.

    Its memory modules become ``memory``, their two biases get the shape (1,); its second names of
    the self-attention's weights and the stored ``memory_bank`` (state, not a parameter) are left
    out. The model is ``LM2Config(..., formulation="release", flow="depth", candidate="read",
    pooled_gate="segment")``.

    Args:
        state_dict: of the released ``model``, its tensors as they are.

    Returns:
        A new dict of the same tensors, or views of them.

    Raises:
        ValueError: a weight has two values under its two names, or there is no memory module.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name.split(".")[-1] in ("memory_bank", "inv_freq"):
            continue
        new = name.replace(".mem_attn.memory_module.", ".memory.")
        new = new.replace(".mem_attn.self_attn.", ".self_attn.")
        first = converted.setdefault(new, tensor)
        if first is not tensor and not torch.allclose(first, tensor, 0, 0, equal_nan=True):
            raise ValueError(
                f"release_state_dict: {name} differs from the same weight under its other name"
            )
    for name, tensor in converted.items():
        if name.endswith((".memory.input_bias", ".memory.forget_bias")):
            converted[name] = tensor.reshape(1)
    if not any(".memory." in name for name in converted):
        raise ValueError(
            "release_state_dict: no key has '.mem_attn.memory_module.': this is no checkpoint of "
            "the released model"
        )
    return converted
