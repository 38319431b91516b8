"""What a call changed in a model."""

import dataclasses
from collections.abc import Sequence

from torch import nn

from lm2_kernels.patching.follow import AddedMemory


@dataclasses.dataclass
class Report:
    """What a call changed; print it."""

    action: str  # "added", "swapped", "removed" or "loaded"
    modules: list[str]  # names of the memory layers
    parameters: int  # of the memory layers
    total: int  # of the model, memory layers included
    trainable: int  # that require gradients
    memory: "AddedMemory | None"  # of add_memory: the state between calls
    _model: nn.Module = dataclasses.field(repr=False)

    def __str__(self) -> str:
        layers = (
            "1 memory layer" if len(self.modules) == 1 else f"{len(self.modules)} memory layers"
        )
        return (
            f"{layers} {self.action}: {', '.join(self.modules)}\n"
            f"{self.parameters:,} parameters in them; the model has {self.total:,}, of which "
            f"{self.trainable:,} are trainable"
        )

    def parameter_groups(
        self, lr: float, *, weight_decay: float = 0.0, backbone_lr: float | None = None
    ) -> list[dict[str, object]]:
        """Groups for an optimiser, of what requires gradients now.

        Args:
            lr: of the memory layers.
            weight_decay: of matrices; vectors and scalars get none.
            backbone_lr: of all other parameters, if they are not frozen; ``lr`` unless given.
        """
        own = {id(p) for name in self.modules for p in _parameters(self._model, name)}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                key = (id(parameter) in own, parameter.dim() > 1)
                groups.setdefault(key, []).append(parameter)
        other_lr = lr if backbone_lr is None else backbone_lr
        return [
            {
                "params": groups[is_own, is_matrix],
                "lr": lr if is_own else other_lr,
                "weight_decay": weight_decay if is_matrix else 0.0,
            }
            for is_own, is_matrix in sorted(groups, reverse=True)
        ]


def _parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    return list(model.get_submodule(name).parameters())


def module_names(model: nn.Module, modules: Sequence[nn.Module]) -> list[str]:
    own = set(modules)
    return [name for name, module in model.named_modules() if module in own]


def report_on(
    action: str, model: nn.Module, modules: list[str], memory: "AddedMemory | None" = None
) -> Report:
    own = {id(p): p.numel() for name in modules for p in _parameters(model, name)}
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Report(
        action,
        modules,
        sum(own.values()),
        sum(size for size, _ in sizes),
        sum(size for size, requires_grad in sizes if requires_grad),
        memory,
        model,
    )
