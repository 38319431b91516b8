"""Courses of training, step by step, of models that should learn alike."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

STEPS = 100
# Rounding grows from step to step, in the end into another course of training. So all start from
# the first model's weights again, before who is further from it becomes a matter of luck.
_WINDOW = 10


def losses(
    models: Sequence[nn.Module], loss: Callable[[nn.Module, int], Tensor], lr: float
) -> list[Tensor]:
    """The loss of every step of each model, by plain SGD. (STEPS,) each.

    Args:
        models: of equal parameters but for their dtypes; the first in float64.
        loss: of a model at a step.
        lr: the learning rate.
    """
    optimizers = [torch.optim.SGD(model.parameters(), lr=lr) for model in models]
    found = [[] for _ in models]
    for step in range(STEPS):
        if step % _WINDOW == 0:
            _start_alike(models)
        for model, optimizer, losses in zip(models, optimizers, found, strict=True):
            optimizer.zero_grad()
            value = loss(model, step)
            value.backward()
            optimizer.step()
            losses.append(value.detach())
    return [torch.stack(losses) for losses in found]


@torch.no_grad()
def _start_alike(models: Sequence[nn.Module]) -> None:
    for own in zip(*(model.parameters() for model in models), strict=True):
        start = own[0].to(own[-1].dtype)
        for parameter in own:
            parameter.copy_(start)
