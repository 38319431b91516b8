"""On a GPU: the ways of attention that nobody takes before hardware has run them, or by default."""

import pytest
import torch

import lm2_kernels as lm2
from lm2_kernels import testing
from tools.rounding import assert_rule, tf32_comparisons

triton = pytest.importorskip("triton")

from lm2_kernels.backends.triton import launch, library, tables  # noqa: E402
from tools import forms  # noqa: E402

pytestmark = pytest.mark.gpu


def _checked(case: testing.Case, seed: int) -> list[testing.Comparison]:
    return testing.check_case(case, torch.bfloat16, "triton", "cuda", seed=seed)


def _assert_right_and_repeated(case: testing.Case) -> None:
    """Results and gradients by the rule, and the same bits in 20 runs."""
    assert_rule(lambda seed: _checked(case, seed))
    inputs = testing.make_inputs(case, torch.bfloat16, "cuda")
    first = testing.run_case(case, inputs, "triton")
    for _ in range(20):
        again = testing.run_case(case, inputs, "triton")
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


CASES = (
    testing.Case("memory_attention", 2, 2048, 2048, 2, 0),
    testing.Case("memory_attention", 3, 515, 1027, 2, 0, (("slot_offset", 300),)),
    testing.Case("memory_attention", 2, 300, 515, 2, 0, (("causal", False),)),
    testing.Case("memory_attention", 2, 515, 515, 2, 0, (("dropout_p", 0.9),)),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize(
    ("kernel", "width", "index"),
    [(*key, index) for key, several in tables.CANDIDATES.items() for index in range(len(several))],
)
def test_other_forms_match_oracle_on_gpu(kernel, width, index, case):
    """Those that no table names yet."""
    candidate = tables.CANDIDATES[kernel, width][index]
    if launch.target(0) != "sm_90" or not candidate.is_for(triton.__version__):
        reason = f"{candidate} is not for {launch.target(0)} and triton {triton.__version__}"
        pytest.skip(reason)
    case = case._replace(width=width)
    with forms.measured((kernel, width, candidate.config)) as ran:
        _assert_right_and_repeated(case)
    is_dropped = "dropout_p" in dict(case.options)
    is_taken = kernel == "forward" or candidate.config.form != "specialized" or not is_dropped
    assert (candidate.config in ran.configs) == is_taken == bool(ran.described)


FEW_CASES = (
    testing.Case("memory_attention", 2, 2048, 64, 2, 0),
    testing.Case("memory_attention", 3, 515, 45, 2, 0, (("slot_offset", 30),)),
    testing.Case("memory_attention", 70, 130, 16, 2, 0, (("slot_mask", "prefix"),)),
    testing.Case("memory_attention", 2, 515, 32, 2, 0, (("dropout_p", 0.9), ("causal", False))),
)


@pytest.mark.parametrize("case", FEW_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize(
    ("kernel", "width", "index"),
    [(*key, i) for key, several in tables.CANDIDATES_FEW.items() for i in range(len(several))],
)
def test_few_slots_kept_match_oracle_on_gpu(kernel, width, index, case):
    if launch.target(0) != "sm_90":
        pytest.skip(f"the tiles are for sm_90, this is {launch.target(0)}")
    config = tables.CANDIDATES_FEW[kernel, width][index].config
    case = case._replace(width=width)
    with forms.measured((kernel, width, config), wave=tables._ONE_WAVE) as ran:
        _assert_right_and_repeated(case)
    assert "resident" in {config.form for config in ran.configs}


def test_descriptors_under_a_graph():
    """A replay reads what the buffers hold then."""
    chosen = [(kernel, 64, tables.CANDIDATES[kernel, 64][0].config) for kernel in forms.KERNELS]
    if launch.target(0) != "sm_90":
        pytest.skip(f"descriptors are for sm_90, this is {launch.target(0)}")
    tensors = [torch.randn(2, 300, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    *inputs, dout = tensors
    for tensor in inputs:
        tensor.requires_grad_()

    def run() -> list[torch.Tensor]:
        out = lm2.memory_attention(*inputs, backend="triton")
        return [out, *torch.autograd.grad(out, inputs, dout)]

    with forms.measured(*chosen) as ran:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        assert all(torch.equal(got, want) for got, want in zip(captured, run(), strict=True))
    assert {config for *_, config in chosen} <= {*ran.configs}


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("width", (64, 128, 256))
@pytest.mark.parametrize("name", library.KERNELS)
def test_library_kernels_match_oracle_on_gpu(name, width, causal, monkeypatch):
    case = testing.Case("memory_attention", 2, 600, 600, 2, width, (("causal", causal),))
    inputs = testing.make_inputs(case, torch.bfloat16, "cuda").tensors
    tensors = [inputs[key].detach() for key in ("query", "key", "value")]
    if not library.serves(name, *tensors, causal, width**-0.5):
        pytest.skip(f"PyTorch's {name} kernel does not take heads of {width} here")
    chosen = {(launch.target(0), width): tables.Library(name, 0, 0)}
    monkeypatch.setattr(tables, "LIBRARY", chosen)
    launch.forget()
    try:
        with lm2.recording() as calls:
            assert_rule(lambda seed: _checked(case, seed))
    finally:
        launch.forget()
    assert ("memory_attention_forward", f"triton/{name}") in calls


@pytest.mark.parametrize("options", ((), (("dropout_p", 0.3),), (("causal", False),)))
@pytest.mark.parametrize("width", (64, 128, 256, 80))
def test_tf32_is_as_near_as_its_bits_allow_on_gpu(width, options):
    case = testing.Case("memory_attention", 2, 300, 515, 2, width, options)
    torch.set_float32_matmul_precision("high")
    try:
        assert_rule(lambda seed: tf32_comparisons(case, seed, "cuda"))
        inputs = testing.make_inputs(case, torch.float32, "cuda")
        results = testing.run_case(case, inputs, "triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    # beside eager's exact float32 it is far off: these are TF32 products
    compared = testing.compare_case(case, inputs, results)
    assert max(comparison.share for comparison in compared) > 10.0
