"""The numeric tests as other processors, BLAS libraries and thread counts would run them.

``PYTHONPATH=tests python -m tools.processors`` runs each environment in turn, about a minute each
on two cores, and ends with a line for each; arguments go to pytest. A level that this processor
lacks is the best it has. Left out is what takes long and what no environment moves but by its
yardstick: Triton's interpreter, the emulated GPU, torch.compile.
"""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = (
    "tests/backends/test_backends.py",
    "tests/backends/test_cpu_products.py",
    "tests/backends/test_dropout.py",
    "tests/backends/test_random_cases.py",
    "tests/bench/test_bench.py",
    "tests/cli/test_cli.py",
    "tests/cli/test_demo.py",
    "tests/layers/test_layers.py",
    "tests/layers/test_recompute.py",
    "tests/layers/test_write_rules.py",
    "tests/model/test_decoder.py",
    "tests/model/test_generation.py",
    "tests/patching/test_patching.py",
    "tests/state/test_segments.py",
    "tests/test_autograd.py",
    "tests/test_functional.py",
    "tests/test_linear.py",
    "tests/test_operators.py",
    "tests/test_reference.py",
    "tests/test_tanh.py",
    "tests/testing/test_invariants.py",
    "tests/training/test_curves.py",
    "tests/training/test_loop.py",
)
ENVIRONMENTS: tuple[dict[str, str], ...] = (
    {},
    *({"LM2_KERNELS_CPU_LEVEL": level} for level in ("base", "avx2", "avx512")),
    *({"ATEN_CPU_CAPABILITY": level} for level in ("default", "avx2", "avx512")),
    *({"MKL_ENABLE_INSTRUCTIONS": level} for level in ("AVX2", "AVX512")),
    *({"ONEDNN_MAX_CPU_ISA": level} for level in ("AVX2", "AVX512_CORE", "AVX512_CORE_BF16")),
    {"OMP_NUM_THREADS": "1"},
    # the suite itself runs one thread a worker
    {"LM2_KERNELS_TEST_THREADS": "2"},
    # what an old laptop has
    {
        "LM2_KERNELS_CPU_LEVEL": "base",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
)


def main(arguments: list[str]) -> int:
    """Returns how many environments failed."""
    chosen = ["-k", "not triton and not cpp-cuda and not compile"]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *chosen, *FILES, *arguments]
    # but where the tests have all cores themselves
    has_xdist = importlib.util.find_spec("xdist") is not None
    side_by_side = ["-n", "auto", "--dist", "worksteal"] if has_xdist else []
    lines = []
    for variables in ENVIRONMENTS:
        title = " ".join(f"{name}={value}" for name, value in variables.items()) or "as it is"
        print(f"=== {title}", flush=True)
        workers = [] if "LM2_KERNELS_TEST_THREADS" in variables else side_by_side
        start = time.monotonic()
        code = subprocess.run(
            command + workers, env=os.environ | variables, cwd=ROOT, check=False
        ).returncode
        verdict = "passed" if code == 0 else f"FAILED ({code})"
        lines.append(f"{title}: {verdict} in {time.monotonic() - start:.0f} s")
    print(*lines, sep="\n")
    return sum("FAILED" in line for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
