"""A hundred steps of training: fused kernels and the oracle learn alike."""

import copy

import pytest
import torch

from lm2_kernels.testing import Comparison, compare
from tools.models import random_ids, small_model, use_oracle
from tools.native import cpp_reason
from tools.rounding import assert_rule

# Rounding grows from step to step, in the end into another course of training. So all start from
# the float64 model's weights again, before who is further from it becomes a matter of luck.
STEPS, WINDOW = 100, 10
BACKENDS = ["eager", *(["cpp"] if cpp_reason() is None else [])]


@torch.no_grad()
def _start_alike(models):
    for own in zip(*(model.parameters() for model in models), strict=True):
        start = own[0].float()
        for parameter in own:
            parameter.copy_(start)


def _compare_losses(seed, formulation, flow, autocast) -> list[Comparison]:
    options = {"formulation": formulation, "flow": flow, "memory_slots": 12}
    options |= {"num_hidden_layers": 2, "initializer_range": 0.2}
    plain = use_oracle(small_model(torch.float32, seed, **options))
    models = [copy.deepcopy(plain).double(), plain]
    models += [small_model(torch.float32, seed, backend=name, **options) for name in BACKENDS]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.03) for model in models]
    losses = [[] for _ in models]
    for step in range(STEPS):
        if step % WINDOW == 0:
            _start_alike(models)
        # the second segment repeats the first
        ids = random_ids(4, 12, seed=step % 3).repeat(1, 2)
        for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast and index > 0):
                loss = model(ids, ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[index].append(loss.detach())
    oracle, eager, *fused = map(torch.stack, losses)
    assert oracle[-1] < 0.6 * oracle[0], "it does not learn"
    return [compare(name, own, oracle, eager) for name, own in zip(BACKENDS, fused, strict=True)]


@pytest.mark.parametrize(
    ("formulation", "flow", "autocast"),
    [
        ("paper", "depth", False),
        ("release", "time", True),
        pytest.param("paper", "depth", True, marks=pytest.mark.slow),
        pytest.param("release", "time", False, marks=pytest.mark.slow),
    ],
)
def test_training_curves(formulation, flow, autocast):
    """The rule on the losses of all steps."""
    assert_rule(lambda seed: _compare_losses(seed, formulation, flow, autocast))
