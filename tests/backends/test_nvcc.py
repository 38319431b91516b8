"""What nvcc makes of the CUDA kernels, on a machine without a GPU."""

import pytest
import torch
from torch.utils import cpp_extension

from tools import nvcc
from tools.compiling import load_setup
from tools.interpreter import run_python

_REASON = None if nvcc.nvcc_path() is not None else "no CUDA toolkit"
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


# of everyday runs: where they take most registers of those that many have
_ARCHS = (90,)
every_source = pytest.mark.parametrize("source", nvcc.SOURCES, ids=lambda source: source.name)


def _check(source, archs):
    kernels, warnings = nvcc.compile_source(source, archs)
    assert not warnings
    assert {kernel.arch for kernel in kernels} == {f"sm_{arch}" for arch in archs}
    assert not [kernel for kernel in kernels if kernel.spilled_bytes]


@every_source
def test_no_warning_and_no_spill(source):
    _check(source, _ARCHS)


def test_kernels_link_and_load_without_a_driver(tmp_path, monkeypatch):
    """Nothing is left to be found but what torch and the system bring."""
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    extension = load_setup().cuda_extension(torch, cpp_extension, {})
    objects = [nvcc.compiled(source, _ARCHS) / "object.o" for source in nvcc.SOURCES]
    library = nvcc.link(objects, extension, tmp_path)
    code = f"import torch, lm2_kernels; torch.ops.load_library({str(library)!r})"
    done = run_python(code, LD_BIND_NOW="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@every_source
def test_no_warning_and_no_spill_anywhere(source):
    _check(source, nvcc.ARCHS)


def test_attention_uses_tensor_cores():
    source = next(source for source in nvcc.SOURCES if source.name == "memory_attention.cu")
    text = nvcc.ptx(source, 80)
    for dtype in ("bf16", "f16"):
        assert f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32" in text
    assert "tf32" not in text
    # operands by whole matrices, tiles by copies that land while another is computed with
    for instruction in ("ldmatrix.sync", ".x4.trans.shared", "cp.async.cg", "cp.async.wait_group"):
        assert instruction in text


def test_a_spill_would_be_seen(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text(
        """
__global__ void __launch_bounds__(1024, 2) spills(float* x) {
  float values[80];
  for (int i = 0; i < 80; ++i) values[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 80; ++i) x[i * 1024 + threadIdx.x] = values[79 - i] * values[(i * 7) % 80];
}
"""
    )
    kernels, warnings = nvcc.compile_source(source, (80,))
    assert warnings
    assert all(kernel.spilled_bytes for kernel in kernels)
