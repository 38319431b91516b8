"""PEFT's adapters beside an added memory. PEFT is not imported: its modules are known by parts."""

import warnings
from collections.abc import Iterable

from torch import nn

from lm2_kernels.state.hub import Place

# what each module has that PEFT puts in place of another
ADAPTER = "adapter_layer_names"
_ORDER = (
    "add the memory to the model first, then the adapters, with modules_to_save=['memory'] in "
    "their config: PEFT then trains, saves and loads the memory with them"
)


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT put adapters into a model, or is it."""
    is_peft = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    return is_peft or any(hasattr(module, ADAPTER) for module in model.modules())


def is_adapter(place: Place) -> bool:
    """Whether a folder or repository has adapters that PEFT saved."""
    return place.path("adapter_config.json").is_file()


def refuse_adapters(model: nn.Module) -> None:
    """Raise ValueError if PEFT came before the memory, which would then be lost on saving."""
    if has_adapters(model):
        raise ValueError(
            f"add_memory: {type(model).__name__} has adapters of PEFT, which would leave the "
            f"memory out of their files; {_ORDER}. Adapters that are trained already can be loaded "
            f"after the memory, or merged before it (merge_and_unload)"
        )


def warn_of_frozen(decoder: nn.Module, memories: Iterable[nn.Module]) -> bool:
    """Warn if the memory does not train although the decoder does. Returns whether it did.

    Args:
        decoder: in training, with gradients enabled.
        memories: what its blocks have as ``memory``: PEFT's wrapper if it is to be saved.
    """
    memories = list(memories)
    own = [memory for memory in memories if not hasattr(memory, ADAPTER)]
    frozen = [p for memory in own for p in memory.parameters() if not p.requires_grad]
    trained = [p for memory in memories for p in memory.parameters() if p.requires_grad]
    if trained and not frozen:
        return False
    if has_adapters(decoder):
        text = (
            f"the adapter of PEFT that trains does not have the memory among its modules_to_save: "
            f"the memory's own weights are frozen, and not in the adapter's files; {_ORDER}. To "
            f"keep the memory as it is, save the model with it: merge_and_unload, then "
            f"save_pretrained"
        )
    elif not trained:
        text = (
            "no parameter of the memory requires gradients, although the model trains: something "
            "froze them after add_memory"
        )
    else:
        return False
    warnings.warn(f"add_memory: {text}", stacklevel=2)
    return True
