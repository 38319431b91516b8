"""The dropout mask: its statistics, and that forward and backward use one and the same."""

import itertools
import math

import pytest
import torch

import lm2_kernels as lm2
from lm2_kernels import testing
from lm2_kernels.backends import composite, dropout
from tools.native import needs_cpp
from tools.rounding import assert_rule

BACKENDS = ("eager", pytest.param("cpp", marks=needs_cpp))
SIGMAS = 4.0
ROWS, SLOTS = 512, 512


def mask(p: float, *, seed: int = 1234, rows: int = ROWS, slots: int = SLOTS) -> torch.Tensor:
    return dropout.keep_mask(torch.tensor(seed), p, torch.arange(rows), slots)


def assert_rate(kept: torch.Tensor, expected: float) -> None:
    """The share of True is within 4 standard deviations of a fair coin's."""
    sigma = math.sqrt(expected * (1.0 - expected) / kept.numel())
    assert abs(kept.double().mean().item() - expected) <= SIGMAS * sigma


def assert_independent(a: torch.Tensor, b: torch.Tensor) -> None:
    """The correlation of two masks is within 4 standard deviations of 0."""
    correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())).double())[0, 1].item()
    assert abs(correlation) <= SIGMAS / math.sqrt(a.numel())


every_p = pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.5, 0.9, 0.99])


@every_p
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**32])
def test_rate(p, seed):
    assert_rate(mask(p, seed=seed), 1.0 - p)


@every_p
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "slots"])
def test_rate_of_every_row_and_slot(p, axis):
    """No row and no slot is favoured: the counts spread as a binomial's do."""
    kept = mask(p).sum(dim=1 - axis).double()
    variance = ROWS * p * (1.0 - p)
    chi_square = ((kept - ROWS * (1.0 - p)).square() / variance).sum().item()
    assert abs(chi_square - len(kept)) <= SIGMAS * math.sqrt(2.0 * len(kept))


@every_p
@pytest.mark.parametrize("distance", [1, 2, 3, 16, 64])
def test_neighbouring_slots_are_independent(p, distance):
    kept = mask(p)
    assert_independent(kept[:, distance:], kept[:, :-distance])


@every_p
@pytest.mark.parametrize("distance", [1, 2, 3, 16, 64])
def test_neighbouring_rows_are_independent(p, distance):
    """Also heads and batches: they are rows further on."""
    kept = mask(p)
    assert_independent(kept[distance:], kept[:-distance])


@every_p
def test_diagonal_neighbours_are_independent(p):
    kept = mask(p)
    assert_independent(kept[1:, 1:], kept[:-1, :-1])
    assert_independent(kept[1:, :-1], kept[:-1, 1:])


@every_p
@pytest.mark.parametrize("other", [1235, 1234 ^ (1 << 31), 1234 + (1 << 32), -1234])
def test_seeds_are_independent(p, other):
    assert_independent(mask(p), mask(p, seed=other))


def test_rows_past_32_bits_are_independent():
    """A row's number may need more than 32 bits; its high half matters."""
    seed, low = torch.tensor(7), torch.arange(ROWS)
    masks = [dropout.keep_mask(seed, 0.5, low + high * 2**32, SLOTS) for high in (0, 1, 2)]
    for a, b in itertools.combinations(masks, 2):
        assert_independent(a, b)


def test_byte_patterns_are_uniform():
    """Chi-square of the 256 patterns of 8 neighbouring slots at p = 1/2."""
    kept = mask(0.5, rows=2048, slots=1024).view(-1, 8)
    patterns = (kept * torch.tensor([1 << bit for bit in range(8)])).sum(dim=1)
    counts = torch.bincount(patterns, minlength=256).double()
    expected = len(patterns) / 256
    chi_square = ((counts - expected).square() / expected).sum().item()
    assert abs(chi_square - 255) <= SIGMAS * math.sqrt(2 * 255)


def test_mixing_is_a_bijection_of_32_bits():
    """Distinct inputs stay distinct: a sample of low, high and scattered values."""
    values = torch.cat((torch.arange(1 << 16), torch.arange(1 << 16) << 16)).unique()
    mixed = dropout.mix(values)
    assert mixed.unique().numel() == values.numel()
    assert mixed.min() >= 0
    assert mixed.max() < 2**32


def test_threshold_spans_the_range():
    assert dropout.threshold(0.0) == 0
    assert dropout.threshold(0.5) == 2**31
    assert dropout.threshold(1.0) == 2**32 - 1


def test_mask_is_a_function_of_the_position_alone():
    """Any block of rows and slots agrees with the whole."""
    whole, seed = mask(0.3), torch.tensor(1234)
    for start, end, slots in ((0, 1, SLOTS), (100, 133, 64), (511, 512, 1)):
        block = dropout.keep_mask(seed, 0.3, torch.arange(start, end), slots)
        assert torch.equal(block, whole[start:end, :slots])
    scattered = torch.tensor([[5, 3], [400, 5]])
    assert torch.equal(dropout.keep_mask(seed, 0.3, scattered, SLOTS), whole[scattered])


def test_a_larger_p_drops_a_superset():
    assert not (mask(0.6) & ~mask(0.5)).any()


def test_p_zero_keeps_everything():
    assert mask(0.0).all()


# --- in memory attention ----------------------------------------------------------------------

every_backend = pytest.mark.parametrize("backend", BACKENDS)
BATCH, TOKENS, HEADS = 2, 70, 3


def read_identity(p: float, seed: int, backend: str, *, tokens: int = TOKENS, slots: int = 40):
    """Read a bank of unit vectors: the result holds the (dropped) probabilities themselves.

    Returns the value (B, N, H, N), which takes a gradient, and the result (B, T, H, N).
    """
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, tokens, HEADS, slots, generator=generator)
    key = torch.randn(BATCH, slots, HEADS, slots, generator=generator)
    value = torch.eye(slots)[None, :, None, :].repeat(BATCH, 1, HEADS, 1).requires_grad_()
    torch.manual_seed(seed)
    result = lm2.memory_attention(query, key, value, causal=False, dropout_p=p, backend=backend)
    return value, result


@every_backend
@pytest.mark.parametrize("p", [0.2, 0.7])
def test_forward_and_backward_drop_the_same(p, backend):
    value, result = read_identity(p, 3, backend)
    kept_forward = (result != 0).transpose(1, 2)  # (B, H, T, N)
    assert_rate(kept_forward, 1.0 - p)
    # the gradient of value[n] for a cotangent at token t alone is the dropped probability (t, n)
    for token in (0, 1, 33, TOKENS - 1):
        cotangent = torch.zeros_like(result)
        cotangent[:, token] = 1.0
        (dvalue,) = torch.autograd.grad(result, value, cotangent, retain_graph=True)
        kept_backward = (dvalue[..., 0] != 0).transpose(1, 2)  # (B, H, N)
        assert torch.equal(kept_backward, kept_forward[:, :, token])


@every_backend
def test_mask_is_the_documented_one(backend):
    """Row (b, h, t) is number (b H + h) T + t, under a seed drawn from the default generator."""
    _, result = read_identity(0.4, 3, backend)
    torch.manual_seed(3)
    drawn = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    rows = torch.arange(BATCH * HEADS * TOKENS).view(BATCH, HEADS, TOKENS)
    expected = dropout.keep_mask(drawn, 0.4, rows, 40)
    assert torch.equal((result != 0).transpose(1, 2), expected)


@every_backend
def test_kept_probabilities_are_divided_by_the_keep_rate(backend):
    p = 0.4

    def run(seed):
        plain = read_identity(0.0, seed, backend)[1].detach()
        dropped = read_identity(p, seed, backend)[1].detach()
        kept = dropped != 0
        oracle = plain.double()[kept] / (1.0 - p)
        return [testing.compare("output", dropped[kept], oracle, plain[kept] / (1.0 - p))]

    assert_rule(run)


@every_backend
def test_block_size_does_not_matter(backend, monkeypatch):
    """The eager path works in blocks of query rows; the mask does not know."""

    _, whole = read_identity(0.4, 3, backend)
    monkeypatch.setattr(composite, "_BLOCK_ELEMENTS", 1)
    _, blocked = read_identity(0.4, 3, backend)
    assert torch.equal(whole != 0, blocked != 0)


@every_backend
def test_p_zero_is_no_dropout_bit_for_bit(backend):
    value, without = read_identity(0.0, 3, backend)
    other_value, zero = read_identity(0, 4, backend)
    assert torch.equal(without, zero)
    assert torch.equal(
        torch.autograd.grad(without.square().sum(), value)[0],
        torch.autograd.grad(zero.square().sum(), other_value)[0],
    )


@every_backend
def test_p_zero_draws_nothing_from_the_generator(backend):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    lm2.memory_attention(*(torch.ones(1, 2, 1, 4) for _ in range(3)), backend=backend)
    assert torch.equal(torch.get_rng_state(), before)


@every_backend
def test_manual_seed_reproduces(backend):
    (_, first), (_, second) = read_identity(0.4, 3, backend), read_identity(0.4, 3, backend)
    assert torch.equal(first, second)


@every_backend
def test_consecutive_calls_and_other_seeds_differ(backend):
    _, first = read_identity(0.4, 3, backend)
    _, other = read_identity(0.4, 4, backend)
    assert_independent(first != 0, other != 0)
    query, key = torch.randn(1, 40, 1, 8), torch.randn(1, 40, 1, 8)
    torch.manual_seed(3)
    calls = [
        lm2.memory_attention(query, key, key, dropout_p=0.5, backend=backend) for _ in range(2)
    ]
    assert not torch.equal(*calls)


@pytest.mark.parametrize("layer", [lm2.PaperMemory, lm2.ReleaseMemory])
def test_layers_drop_only_while_training(layer):
    module = layer(8, 2, dropout=0.5)
    x, memory = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    plain = layer(8, 2)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module.eval()(x, memory)[0], plain(x, memory)[0])
    assert not torch.equal(module.train()(x, memory)[0], plain(x, memory)[0])
