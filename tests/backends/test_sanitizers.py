"""Every C++ and CUDA kernel under AddressSanitizer, UBSan and ThreadSanitizer, and proof that these
catch the bugs they are there for: planted ones are reported.

The CUDA kernels run in the SIMT emulator of tests/native, where a missing barrier, or an access of
two blocks that nothing orders, is a data race whatever order they ran in.
"""

import re
import shutil
import subprocess

import pytest

from tools import sanitizers
from tools.emulated_cuda import emulation_reason
from tools.sanitizers import Plant


def _sanitizer_reason() -> str | None:
    if shutil.which("g++") is None:
        return "no g++"
    probe = ["g++", "-fsanitize=thread", "-x", "c++", "-", "-o", "/dev/null"]
    done = subprocess.run(probe, input="int main(){}", capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else "g++ has no sanitizers"


_REASON = _sanitizer_reason()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
_emulated = pytest.mark.skipif(emulation_reason() is not None, reason=str(emulation_reason()))
# what the reports begin with
_RACE = "ThreadSanitizer: data race"
_OVERFLOW = r"AddressSanitizer: (\S+-buffer-overflow|unknown-crash)"
_MISALIGNED = "runtime error: .*misaligned address"

PLANTS = (
    Plant(
        "C++: whole vectors past the end of a row",
        "cpu",
        "address",
        "cpu/rows.h",
        "i + S::kLanes <= count;",
        "i < count;",
        "level_avx2.cpp",
        _OVERFLOW,
    ),
    Plant(
        "C++: a mask of one lane too many",
        "cpu",
        "address",
        "cpu/simd.h",
        "static_cast<__mmask16>((1u << count) - 1)",
        "static_cast<__mmask16>((2u << count) - 1)",
        "level_avx512.cpp",
        _OVERFLOW,
    ),
    Plant(
        "C++: all threads add to the same partial sums",
        "cpu",
        "thread",
        "cpu/residual_layer_norm.h",
        "Scalar* const dweight = partials + 2 * item * stride;",
        "Scalar* const dweight = partials;",
        "level_base.cpp",
        _RACE,
    ),
    Plant(
        "C++: top-k keeps one score too many",
        "cpu",
        "address",
        "cpu/dispatch.cpp",
        "for (int64_t j = 0; j < count; ++j) {",
        "for (int64_t j = 0; j <= count; ++j) {",
        "dispatch.cpp",
        _OVERFLOW,
    ),
    Plant(
        "CUDA: missing barrier before a sum's memory is used again",
        "cuda",
        "thread",
        "cuda/simt.h",
        "  // before the next call writes\n  __syncthreads();",
        "",
        "residual_layer_norm.cu",
        _RACE,
    ),
    Plant(
        "CUDA: missing barrier before tiles are read",
        "cuda",
        "thread",
        "cuda/memory_attention.cu",
        "    __syncthreads();\n    float s[kOther / 8][4];",
        "    float s[kOther / 8][4];",
        "memory_attention.cu",
        _RACE,
    ),
    Plant(
        "CUDA: missing barrier before a tile is written over",
        "cuda",
        "thread",
        "cuda/memory_attention.cu",
        "    // before a tile is written over\n    __syncthreads();",
        "",
        "memory_attention.cu",
        _RACE,
    ),
    Plant(
        "CUDA: one column too many",
        "cuda",
        "address",
        "cuda/memory_update.cu",
        "is_there = column < args.width;",
        "is_there = column <= args.width;",
        "memory_update.cu",
        _OVERFLOW,
    ),
    Plant(
        "CUDA: blocks write the same partial sums",
        "cuda",
        "thread",
        "cuda/residual_layer_norm.cu",
        "partials[2 * item * args.width + column] = dweight;",
        "partials[column] = dweight;",
        "residual_layer_norm.cu",
        _RACE,
    ),
    Plant(
        "CUDA: vectors loaded from any address",
        "cuda",
        "address",
        "cuda/memory_attention.cu",
        "if (!job.vectors) {",
        "if (job.args.width % 16 != 0) {",
        "memory_attention.cu",
        _MISALIGNED,
    ),
    Plant(
        "CUDA: no memory for the sums of parts",
        "cuda",
        "address",
        "cuda/memory_attention.cu",
        "args.tokens + sums_of(job)) * 4;",
        "args.tokens) * 4;",
        "memory_attention.cu",
        _OVERFLOW,
    ),
    Plant(
        "CUDA: shared memory of one warp less",
        "cuda",
        "address",
        "cuda/memory_attention.cu",
        "Tile::bytes(split.warps,",
        "Tile::bytes(split.warps - 1,",
        "memory_attention.cu",
        _OVERFLOW,
    ),
    Plant(
        "CUDA: parts write the same sums",
        "cuda",
        "thread",
        "cuda/memory_attention.cu",
        "b * parts + part",
        "b * parts",
        "memory_attention.cu",
        _RACE,
    ),
    Plant(
        "CUDA: rows of a tile that share a bank",
        "cuda",
        "address",
        "cuda/memory_attention.cu",
        "kStride = kWidth + 16 /",
        "kStride = kWidth + 0 * 16 /",
        "memory_attention.cu",
        "share a bank",
    ),
)


@pytest.mark.parametrize("sanitizer", sanitizers.SANITIZERS)
def test_cpu_kernels(sanitizer):
    with sanitizers.harness("cpu", sanitizer) as program:
        for level in ("base", "avx2", "avx512", "avx512_bf16"):
            done = sanitizers.run(program, LM2_KERNELS_CPU_LEVEL=level)
            assert (done.returncode, done.stdout) == (0, "clean\n"), done.stdout + done.stderr


@_emulated
@pytest.mark.parametrize(
    ("sanitizer", "environment"),
    [
        ("address", {}),
        # as on sm_75, without copies that land later
        pytest.param("address", {"CUEMU_MAJOR": "7"}, marks=pytest.mark.slow),
        ("thread", {}),
        pytest.param("thread", {"HARNESS_ALL": "1"}, marks=pytest.mark.slow),
    ],
    ids=("address", "address-sm_75", "thread", "thread-all"),
)
def test_cuda_kernels(sanitizer, environment):
    with sanitizers.harness("cuda", sanitizer) as program:
        done = sanitizers.run(program, **environment)
        assert (done.returncode, done.stdout) == (0, "clean\n"), done.stdout + done.stderr


# those quickest to compile are enough for every day
_EVERYDAY = (
    "C++: all threads add to the same partial sums",
    "C++: top-k keeps one score too many",
    "CUDA: one column too many",
)


def _param(plant: Plant):
    marks = () if plant.name in _EVERYDAY else pytest.mark.slow
    return pytest.param(plant, id=plant.name, marks=marks)


@pytest.mark.parametrize("plant", [_param(plant) for plant in PLANTS])
def test_planted_bug_is_caught(plant):
    if plant.target == "cuda" and emulation_reason() is not None:
        pytest.skip(emulation_reason())
    with sanitizers.harness(plant.target, plant.sanitizer, plant) as program:
        # where a SIMD level has the bug, that level
        level = re.findall(r"level_(\w+)", plant.compiled)
        done = sanitizers.run(program, LM2_KERNELS_CPU_LEVEL="".join(level))
    assert done.returncode != 0, "nobody noticed"
    assert re.search(plant.report, done.stdout + done.stderr), done.stdout + done.stderr


@_emulated
@pytest.mark.parametrize(
    ("kernel", "sanitizer", "report"),
    (
        # correct ones: no complaint
        ("barrier", "thread", None),
        ("barrier", "address", None),
        ("atomic sum", "thread", None),
        ("shuffles", "address", None),
        ("product", "address", None),
        ("matrices", "address", None),
        ("copies", "thread", None),
        ("zeros", "address", None),
        ("phases", "thread", None),
        ("phases", "address", None),
        ("unwritten shared memory", "address", None),
        ("allowed shared memory", "address", None),
        # the emulator's own checks
        ("divergent barrier", "address", "divergent __syncthreads"),
        ("early exit", "address", "__syncthreads"),
        ("deadlock", "address", "deadlock"),
        ("copies read too early", "address", "not NaN"),
        ("copies read by others too early", "thread", _RACE),
        ("copies never ended", "address", "not waited for"),
        ("copies never waited for", "address", "not waited for"),
        ("misaligned copy", "address", "misaligned copy"),
        ("phase not waited for", "address", "not NaN"),
        ("phase not waited for", "thread", _RACE),
        # those that come late wait for a phase that nobody begins
        ("phase of the other parity", "address", "deadlock"),
        ("phase of too many", "address", "deadlock"),
        ("phase before its barrier", "thread", f"{_RACE}|not initialised"),
        ("shared banks", "address", "share a bank"),
        ("misaligned matrix", "address", "misaligned row"),
        ("not in mask", "address", "caller not in mask"),
        ("grid too large", "address", "invalid launch configuration"),
        ("shared memory that nobody allowed", "address", "cudaFuncSetAttribute has not allowed"),
        # the sanitizers
        ("missing barrier", "thread", _RACE),
        ("unsynchronised sum", "thread", _RACE),
        ("past the end", "address", _OVERFLOW),
        ("past shared memory", "address", _OVERFLOW),
        ("misaligned vector", "address", _MISALIGNED),
    ),
)
def test_emulator(kernel, sanitizer, report):
    done = sanitizers.run(sanitizers.emulator_test(sanitizer), kernel)
    output = done.stdout + done.stderr
    if report is None:
        assert (done.returncode, done.stdout) == (0, "clean\n"), output
    else:
        assert done.returncode != 0, "nobody noticed"
        assert re.search(report, output), output
