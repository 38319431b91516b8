"""The public checks: our models pass them, and each finds what it is for."""

import copy

import pytest
import torch

import lm2_kernels as lm2
from lm2_kernels.testing import invariants
from lm2_kernels.testing.invariants import InvariantError
from tools.models import KINDS, random_ids, small_model

every_kind = pytest.mark.parametrize(("formulation", "flow"), KINDS)
every_dtype = pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))


def _logits(model):
    return lambda ids: model(ids).logits


def _stream(model):
    def step(ids, state):
        output = model(ids, memory=state, use_cache=True)
        return output.logits, output.memory

    return step


def _masked(model):
    return lambda ids, mask: model(ids, attention_mask=mask).logits


@every_kind
@every_dtype
def test_our_models_keep_all_promises(formulation, flow, dtype):
    model = small_model(dtype, formulation=formulation, flow=flow, initializer_range=0.2)
    ids = random_ids(3, 16)
    tolerance = None
    if dtype == torch.bfloat16:
        # roundings pass through three blocks and three segments: two results may be as far apart
        # as the rule lets both be from the float64 model
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(ids).logits
            error = (model(ids).logits - exact).abs().max() / exact.abs().max()
        tolerance = 2 * float(2 * error + torch.finfo(dtype).eps)
    invariants.check_causality(_logits(model), ids, tolerance=tolerance)
    invariants.check_streaming(_stream(model), ids, tolerance=tolerance)
    invariants.check_padding(_masked(model), ids, tolerance=tolerance)
    invariants.check_batch_independence(_logits(model), ids, tolerance=tolerance)


def test_layers_keep_them():
    x, memory = torch.randn(3, 9, 24), torch.randn(1, 9, 24)
    for layer in (lm2.PaperMemory(24, 3), lm2.ReleaseMemory(24, 3, pooled_gate="prefix")):
        for result in (0, 1):

            def run(x, layer=layer, result=result):
                return layer(x, memory.expand(len(x), -1, -1))[result]

            invariants.check_causality(run, x)
            invariants.check_batch_independence(run, x)


def test_the_released_gate_breaks_causality():
    layer = lm2.ReleaseMemory(24, 3, pooled_gate="segment")
    memory = torch.randn(1, 9, 24)
    with pytest.raises(InvariantError, match=r"causality: outputs before token 1 change .* by "):
        invariants.check_causality(lambda x: layer(x, memory)[0], torch.randn(1, 9, 24))
    model = small_model(formulation="release", pooled_gate="segment", initializer_range=0.2)
    with pytest.raises(InvariantError, match="causality"):
        invariants.check_causality(_logits(model), random_ids(2, 12))
    # across whole segments it keeps what it can
    invariants.check_causality(_logits(model), random_ids(2, 12), positions=(6,))
    invariants.check_padding(_masked(model), random_ids(3, 12))
    invariants.check_batch_independence(_logits(model), random_ids(3, 12))


def test_causality_is_found_broken_at_one_token():
    def peeks(x):
        y = x.clone()
        y[:, 4] += 1e-3 * x[:, 7]
        return y

    x = torch.randn(2, 20, 3)
    with pytest.raises(InvariantError, match="before token 6"):
        invariants.check_causality(peeks, x, positions=(3, 6))
    invariants.check_causality(peeks, x, positions=(3, 8))
    with pytest.raises(InvariantError):
        invariants.check_causality(peeks, x)
    with pytest.raises(InvariantError, match="before token 1 "):
        # from the last token to the one before
        invariants.check_causality(
            lambda ids: (ids + ids.roll(-1, 1)).double(), torch.tensor([[4, 7]])
        )
    with pytest.raises(ValueError, match="all tokens are alike"):
        invariants.check_causality(lambda ids: ids.double(), torch.full((1, 9), 3))
    for arguments in ((torch.randn(1, 1, 2),), (x, ())):
        with pytest.raises(ValueError, match="no position to try"):
            invariants.check_causality(lambda x: x, *arguments)
    with pytest.raises(InvariantError, match="is not finite"):
        invariants.check_causality(lambda x: x / 0.0, x)
    with pytest.raises(ValueError, match="from 1 to 19"):
        invariants.check_causality(peeks, x, positions=(20,))


def test_streaming_is_found_broken():
    def forgets(x, state):
        total = x.cumsum(1)
        return total if state is None else total + 0.999 * state, total[:, -1:]

    def carries(x, state):
        total = x.cumsum(1) if state is None else x.cumsum(1) + state
        return total, total[:, -1:]

    x = torch.randn(2, 12, 3).double()
    invariants.check_streaming(carries, x)
    invariants.check_streaming(carries, x, (5, 0, 7))
    with pytest.raises(InvariantError, match="tokens 4 to 4 differ"):
        invariants.check_streaming(forgets, x)
    with pytest.raises(ValueError, match="add up to 12"):
        invariants.check_streaming(carries, x, (5,))


def test_padding_is_found_seen():
    def averages(x, mask):
        return x - x.mean(1, keepdim=True)

    def honest(x, mask):
        real = mask[:, :, None]
        return x - (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)

    x = torch.randn(3, 8, 2).double()
    invariants.check_padding(honest, x)
    invariants.check_padding(honest, x, (8, 1, 3), sides=("left",))
    with pytest.raises(InvariantError, match="row 1, of 7 tokens, changes with left padding"):
        invariants.check_padding(averages, x)


def test_batch_is_found_mixed():
    x = torch.randn(3, 8, 2)
    with pytest.raises(InvariantError, match="row 0 changes with the rows beside it"):
        invariants.check_batch_independence(lambda x: x - x.mean(0), x)
    with pytest.raises(InvariantError, match="order of the rows"):
        invariants.check_batch_independence(lambda x: x + torch.arange(len(x))[:, None, None], x)
    with pytest.raises(InvariantError):
        invariants.check_batch_independence(lambda x: x * (torch.nan if len(x) == 1 else 1), x)
    with pytest.raises(ValueError, match="no others"):
        invariants.check_batch_independence(lambda x: x, x[:1])


def test_wrong_shapes_are_said():
    def shorter(x):
        return x if len(x) == 3 else x[:, :4]

    with pytest.raises(InvariantError, match=r"got shape \(4, 2\) for \(8, 2\)"):
        invariants.check_batch_independence(shorter, torch.randn(3, 8, 2))
