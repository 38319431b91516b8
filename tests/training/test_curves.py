"""A hundred steps of training: fused kernels and the oracle learn alike."""

import copy
import functools
import math

import pytest
import torch

from lm2_kernels.testing.rule import Comparison, compare
from tools import curves
from tools.models import random_ids, small_model, use_oracle
from tools.native import cpp_reason
from tools.rounding import assert_rule

BACKENDS = ["eager", *(["cpp"] if cpp_reason() is None else [])]


def _compare_losses(seed, formulation, flow, autocast) -> list[Comparison]:
    options = {"formulation": formulation, "flow": flow, "memory_slots": 12}
    options |= {"num_hidden_layers": 2, "initializer_range": 0.2}
    plain = use_oracle(small_model(torch.float32, seed, **options))
    exact = copy.deepcopy(plain).double()
    models = [small_model(torch.float32, seed, backend=name, **options) for name in BACKENDS]

    def loss(model, step):
        # the second segment repeats the first
        ids = random_ids(4, 12, seed=step % 3).repeat(1, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and model is not exact):
            return model(ids, ids).loss

    # small steps: with large ones rounding grows into another course of training
    oracle, eager, *fused = curves.losses([exact, plain, *models], loss, lr=0.03)
    assert oracle[-1] < 0.6 * oracle[0], "it does not learn"
    return [compare(name, own, oracle, eager) for name, own in zip(BACKENDS, fused, strict=True)]


@pytest.mark.parametrize(
    ("formulation", "flow", "autocast"),
    [
        # the sharper ones every day
        ("paper", "depth", False),
        ("release", "time", False),
        pytest.param("paper", "depth", True, marks=pytest.mark.slow),
        pytest.param("release", "time", True, marks=pytest.mark.slow),
    ],
)
def test_training_curves(formulation, flow, autocast):
    """The rule on the losses of all steps."""
    # where rounding turns a ReLU off that stays on in the other, no factor is too large for luck
    run = functools.partial(_compare_losses, formulation=formulation, flow=flow, autocast=autocast)
    assert_rule(run, narrow=math.inf)
