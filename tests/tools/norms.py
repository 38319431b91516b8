"""A backend's optional norms, forward and backward, held to autograd of the oracle."""

from typing import NamedTuple

import torch
from torch import Tensor

from lm2_kernels import backends, reference, testing
from lm2_kernels.backends.contract import NORM, NORM_AND_TANH, NORM_OF_RELU

NAMES = (NORM_AND_TANH, NORM_OF_RELU)
# rows of less than a vector, of parts of one, in pieces, and too wide for registers
SHAPES = ((2, 5, 24), (2, 3, 130), (1, 2, 1100), (1, 2, 10_000))
_EPS = 1e-5


class _Given(NamedTuple):
    x: Tensor
    residual: Tensor
    dout: Tensor
    dtanh: Tensor
    dresidual: Tensor
    weight: Tensor
    bias: Tensor


def comparisons(
    backend: str,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    seed: int,
    device: str = "cpu",
) -> list[testing.Comparison]:
    """The rule for every result and every gradient of one of :data:`NAMES`."""
    torch.manual_seed(seed)
    dtypes = {"residual": residual_dtype, "dtanh": dtype, "dresidual": residual_dtype}
    # rows with gaps between them
    *names, width = "x", "residual", "dout", "dtanh", "dresidual", 2 * shape[-1]
    tensors = {
        key: torch.randn(*shape[:-1], width, device=device)[..., : shape[-1]].to(
            dtypes.get(key, dtype)
        )
        for key in names
    }
    for key in ("weight", "bias"):
        tensors[key] = torch.randn(shape[-1], device=device).to(dtype)
    given = _Given(**tensors)
    found = _by_backend(backend, name, given)
    exact = _by_autograd(name, _Given(*(each.double() for each in given)))
    eager = _by_autograd(name, given)
    assert found.keys() == exact.keys()
    for key, result in found.items():
        assert result.dtype == eager[key].dtype and result.is_contiguous(), key
    return [testing.compare(key, found[key], exact[key], eager[key]) for key in exact]


def assert_bits_of_the_op(
    backend: str,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    device: str = "cpu",
) -> None:
    """What is normalised has the bits of the op, of x or of its ReLU, and NaN stays NaN."""
    x, residual = torch.randn(2, *shape, device=device)
    x[0, 1, 2] = torch.nan
    x, residual = x.to(dtype), residual.to(residual_dtype)
    parameters = (*torch.randn(2, shape[-1], device=device).to(dtype), _EPS)
    summand = x.relu() if name == NORM_OF_RELU else x
    found = backends.call(backend, f"{name}_forward", x, residual, *parameters)
    wanted = backends.call(backend, f"{NORM}_forward", summand, residual, *parameters)
    assert wanted[0][0, 1].isnan().all()
    for got, want in zip(found, wanted, strict=False):
        assert torch.equal(got.nan_to_num(), want.nan_to_num())
        assert torch.equal(got.isnan(), want.isnan())


def _by_backend(backend: str, name: str, given: _Given) -> dict[str, Tensor]:
    x, residual, dout, dtanh, dresidual, weight, bias = given

    def call(way: str, *args) -> tuple[Tensor, ...]:
        return backends.call(backend, f"{name}_{way}", *args)

    out, mean, rstd, *of_tanh = call("forward", x, residual, weight, bias, _EPS)
    more = (dtanh, dresidual) if name == NORM_AND_TANH else ()
    found = call("backward", dout, x, residual, weight, mean, rstd, *more, True)
    again = call("backward", dout, x, residual, weight, mean, rstd, *more, False)
    assert all(map(torch.equal, found[:2], again[:2]))
    assert all(each.numel() == 0 for each in again[2:])
    results = {"out": out, **dict(zip(("dx", "dresidual", "dweight", "dbias"), found, strict=True))}
    return results | dict(zip(("tanh",), of_tanh, strict=False))


def _by_autograd(name: str, given: _Given) -> dict[str, Tensor]:
    x, residual, dout, dtanh, dresidual, weight, bias = given
    leaves = [each.clone().requires_grad_() for each in (x, residual, weight, bias)]
    x, residual, weight, bias = leaves
    summand = x.relu() if name == NORM_OF_RELU else x
    results = {"out": reference.residual_layer_norm(summand, residual, weight, bias, _EPS)}
    pairs = [(results["out"], dout)]
    if name == NORM_AND_TANH:
        results["tanh"] = residual.tanh()
        pairs += (results["tanh"], dtanh.to(residual.dtype)), (residual, dresidual)
    outputs, cotangents = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    results = {key: result.detach() for key, result in results.items()}
    return results | dict(zip(("dx", "dresidual", "dweight", "dbias"), gradients, strict=True))
