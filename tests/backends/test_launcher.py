"""Triton's own launcher takes what the package hands to it, at a first launch and at later ones."""

import json
import os
import shutil
import sysconfig
from pathlib import Path

import pytest

from tools.interpreter import run_python

pytest.importorskip("triton")

_HEADER = Path(sysconfig.get_paths()["include"], "Python.h")
needs_compiler = pytest.mark.skipif(
    shutil.which("gcc") is None or not _HEADER.exists(), reason="no gcc, or no headers of Python"
)

# what each case's launches are told, twice: the second time they are bound ones
_LAUNCHES = """
import json
from pathlib import Path
import torch
from lm2_kernels import backends, testing
from lm2_kernels.backends.triton import tables
from tools import forms, stub_cuda

cases = {op: next(case for case in testing.SMALL_CASES if case.op == op) for op in backends.OPS}
cases = {op: (case, ()) for op, case in cases.items()}
read = testing.Case("memory_attention", 2, 65, 40, 2, 64)
full = (("slot_mask", "random"), ("dropout_p", 0.3), ("slot_offset", 2))
cases["every option"] = read._replace(options=full), ()
for form in tables.FORMS[1:]:
    cases[form] = read, forms.small(form)
found = {}
with stub_cuda.launched(Path(FOLDER), "sm_90") as seen:
    for name, (case, chosen) in cases.items():
        inputs = testing.make_inputs(case, torch.bfloat16)
        with forms.measured(*chosen):
            found[name] = []
            for _ in range(2):
                seen.clear()
                testing.run_case(case, inputs, "triton")
                found[name].append(list(seen))
print(json.dumps(found))
"""


@needs_compiler
def test_tritons_launcher_takes_bound_launches_as_its_own(tmp_path):
    code = _LAUNCHES.replace("FOLDER", repr(str(tmp_path)))
    tests = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
    done = run_python(code, TRITON_INTERPRET=None, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 8
    for name, (first, later) in found.items():
        assert first == later, name
        assert 2 <= len(first) <= 4, name
        for kernel, told in first:
            assert told.count("launch") == 1, (name, kernel)
            # tiles are described as CUDA's driver API asks for
            assert "wrong" not in told, (name, kernel)
    described = {name for name, (first, _) in found.items() if "right map" in str(first)}
    assert described == {"descriptors", "specialized"}
