"""The public types, as the checker of a user's file sees them, and as they are at run time."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lm2_kernels as lm2
from tools.compiling import ROOT

FOLDER = Path(__file__).parent / "data" / "typing"


def test_a_checker_reports_what_is_wrong_and_nothing_else(request, tmp_path):
    """``mypy --strict``, on the two files alone, not on what they use."""
    pytest.importorskip("mypy")
    # reading torch takes ten seconds: once, where pytest has its cache
    kept = getattr(request.config, "cache", None)
    cache = kept.mkdir("mypy") if kept else tmp_path
    options = ("--strict", "--follow-imports=silent", "--config-file=", f"--cache-dir={cache}")
    files = [FOLDER / name for name in ("user_code.py", "wrong_code.py")]
    answer = subprocess.run(
        # in the root, which has the package that the tests import, or the same one
        [sys.executable, "-m", "mypy", *options, *map(str, files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    # 2: mypy itself failed
    assert answer.returncode == 1, answer.stdout + answer.stderr
    lines = re.findall(r"^(\S+?):(\d+): error: ", answer.stdout, re.MULTILINE)
    wanted = {
        (file.name, number)
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if line.endswith("# error")
    }
    assert {(Path(path).name, int(line)) for path, line in lines} == wanted, answer.stdout


def test_user_code_has_every_public_name():
    text = (FOLDER / "user_code.py").read_text(encoding="utf-8")
    assert set(lm2.__all__) <= set(re.findall(r"lm2\.(\w+)", text))


@pytest.fixture(scope="module")
def user_code():
    spec = importlib.util.spec_from_file_location("_user_code", FOLDER / "user_code.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_user_code_runs(user_code, tmp_path):
    user_code.ops()
    user_code.backends()
    user_code.layers()
    user_code.model(tmp_path)
    user_code.states(tmp_path)
    user_code.watched(lm2.PaperMemory(16, 2))


def test_user_code_runs_in_other_models(user_code, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    host = transformers.LlamaForCausalLM(config)
    user_code.patching(host)
    lm2.add_memory(host, memory_slots=8, num_heads=2)
    host.save_pretrained(tmp_path)
    lm2.remove_memory(host)
    user_code.saved(host, tmp_path)


@pytest.mark.parametrize("kind", (lm2.PaperMemory, lm2.ReleaseMemory, lm2.LM2ForCausalLM))
def test_a_call_is_typed_as_forward(kind):
    """What a checker takes for ``__call__``, which nn.Module leaves open, is ``forward``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    (forward,) = (node for node in functions if node.name == "forward")
    calls = [node for node in functions if node.name == "__call__"]
    # the last of several is the one that covers all
    assert ast.unparse(calls[-1].returns) == ast.unparse(forward.returns)
    for call in calls:
        assert [a.arg for a in call.args.args] == [a.arg for a in forward.args.args]
        assert [a.arg for a in call.args.kwonlyargs] == [a.arg for a in forward.args.kwonlyargs]
        for own, other in zip(call.args.kwonlyargs, forward.args.kwonlyargs, strict=True):
            if own.arg != "return_pooled_sum":
                assert ast.unparse(own) == ast.unparse(other)
