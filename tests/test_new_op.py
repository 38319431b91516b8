"""CONTRIBUTING's "A new op", taken step by step in a copy of the tree: an op on eager alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# file -> what is put in front of which line; no line is the end of the file
STEPS = {
    "reference.py": (
        None,
        '''

def toy_gate(x: Tensor, weight: Tensor) -> Tensor:
    """``x * sigmoid(weight)``. (B, T, D)"""
    return x * torch.sigmoid(weight)
''',
    ),
    "backends/contract.py": (
        "# the table: what a backend's functions return, by their names",
        '''def toy_gate_forward(x):
    """``out`` (B, T, D)."""
    return (x.new_empty(x.shape),)


def toy_gate_backward(x, weight, needs_dx, needs_dweight):
    """``dx``, ``dweight``."""
    return _like(x, x.shape, needs_dx), _like(weight, weight.shape, needs_dweight)


''',
    ),
    "backends/eager.py": (
        None,
        '''

def toy_gate_forward(x: Tensor, weight: Tensor) -> Tensor:
    """See :mod:`lm2_kernels.backends.contract`."""
    dtype = accumulation_dtype(x)
    return (x.to(dtype) * torch.sigmoid(weight.to(dtype))).to(x.dtype)


def toy_gate_backward(
    dout: Tensor, x: Tensor, weight: Tensor, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`."""
    dtype = accumulation_dtype(x)
    gate, dout = torch.sigmoid(weight.to(dtype)), dout.to(dtype)
    slope = gate * (1 - gate)
    dx = (dout * gate).to(x.dtype) if needs_dx else x.new_empty(0)
    dweight = x.new_empty(0)
    if needs_dweight:
        dweight = (dout * x.to(dtype) * slope).sum((0, 1)).to(weight.dtype)
    return dx, dweight
''',
    ),
    "autograd.py": (
        "FUNCTIONS = {",
        '''class ToyGateFunction(torch.autograd.Function):
    """Saves x and weight by reference."""

    @staticmethod
    def forward(*args) -> Tensor:
        return _forward("toy_gate", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *saved, ctx.backend = inputs
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx, dout):
        needs = ctx.needs_input_grad[:2]
        grads = _run_backward(
            ctx, "toy_gate_backward", dout, *ctx.saved_tensors, *needs
        )
        return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None


''',
    ),
    "unchecked.py": (
        None,
        """

def toy_gate(x: Tensor, weight: Tensor, *, backend: str | None) -> Tensor:
    name = select("toy_gate", (x, weight), backend)
    from lm2_kernels.autograd import ToyGateFunction
    return apply(ToyGateFunction, contiguous_rows(x), contiguous_rows(weight), name)
""",
    ),
    "functional.py": (
        None,
        """

def toy_gate(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    check_shape("toy_gate", "x", x, "(B, T, D)", (None,) * 3)
    return unchecked.toy_gate(x, weight, backend=backend)
""",
    ),
    "testing/cases.py": (
        "INPUTS = {",
        """def _toy_inputs(case: Case, draw: _Draw, generator: torch.Generator) -> Inputs:
    rows = (case.batch, case.tokens, case.width)
    return Inputs({"x": draw(*rows), "weight": draw(case.width)}, {}, (draw(*rows),))


SMALL_CASES += (Case("toy_gate", 2, 5, 0, 0, 7),)
CASES = SMALL_CASES + LARGE_CASES


""",
    ),
}
ENTRIES = {
    "backends/contract.py": (
        "    for function in (",
        "        toy_gate_forward,\n        toy_gate_backward,",
    ),
    "autograd.py": ("FUNCTIONS = {", '    "toy_gate": ToyGateFunction,'),
    "testing/cases.py": ("INPUTS = {", '    "toy_gate": _toy_inputs,'),
}


@pytest.fixture
def tree(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", "results")
    for name in ("lm2_kernels", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("csrc", "setup.py", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, (line, text) in STEPS.items():
        path = tmp_path / "lm2_kernels" / name
        source = path.read_text("utf-8")
        if line is None:
            source = source.rstrip("\n") + "\n" + text
        else:
            assert source.count(f"\n{line}\n") == 1, name
            source = source.replace(f"\n{line}\n", f"\n{text}{line}\n")
        if name in ENTRIES:
            table, entry = ENTRIES[name]
            # where there are several, the first
            source = source.replace(f"\n{table}\n", f"\n{table}\n{entry}\n", 1)
        path.write_text(source, "utf-8")
    return tmp_path


def _run(tree, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_new_op_is_picked_up(tree):
    suite, chosen = "tests/backends/test_backends.py", "matches_oracle and toy"
    out = _run(tree, "-m", "pytest", "-rA", "-q", "-p", "no:cacheprovider", suite, "-k", chosen)
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        assert (
            f"PASSED tests/backends/test_backends.py::test_op_matches_oracle[eager-{dtype}" in out
        )
    # the others say that they lack it, and nothing fails
    assert "triton: it has no toy_gate" in out
    _run(tree, "-m", "lm2_kernels", "verify", "--backend", "eager", "--json", "verified.json")
    checks = json.loads((tree / "verified.json").read_text("utf-8"))["checks"]
    assert {check["dtype"] for check in checks if "toy_gate" in check["case"]} == {
        "float32",
        "bfloat16",
        "float16",
        "float64",
    }
    # "auto" finds the one backend that has it, eagerly and as an operator of a compiled graph
    code = (
        "import torch, lm2_kernels as lm2; from lm2_kernels import functional; "
        "x, w = torch.ones(1, 2, 3, requires_grad=True), torch.zeros(3); "
        "run = torch.compile(functional.toy_gate, fullgraph=True, backend='aot_eager'); "
        "run(x, w).sum().backward(); print(x.grad.unique().tolist(), run(x.detach(), w).shape)"
    )
    assert _run(tree, "-c", code).strip() == "[0.5] torch.Size([1, 2, 3])"


def test_contributing_names_the_steps():
    """The files that these steps change are those that CONTRIBUTING's steps name."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    steps = text.split("## A new op\n")[1].split("\n## ")[0]
    for name in STEPS:
        assert f"`{name}`" in steps, name
