"""The build: what it finds, what it leaves out and says, and what a wheel and an sdist hold."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from lm2_kernels.backends import extension
from lm2_kernels.version import sources_digest
from tools import nvcc
from tools.compiling import ROOT, load_setup

BUILD_TOOLS = ("setuptools", "pybind11", "ninja")
_MISSING = [name for name in BUILD_TOOLS if importlib.util.find_spec(name) is None]
needs_tools = pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {_MISSING}")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
VARIABLES = (
    *("LM2_KERNELS_BUILD", "FORCE_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"),
    *("NVCC_THREADS", "CXX", "LM2_KERNELS_TORCH_PYTHON", "PIP_BUILD_TRACKER", "CONDA_PREFIX"),
)


# what torch's CUDA builds for Linux require
PINNED_TRITON = {"2.11.0": "3.6.0", "2.12.0": "3.7.0", "2.13.0": "3.7.1", "2.14.1": "3.8.0"}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def setup():
    if load_setup() is None:
        pytest.skip("not installed: setuptools")
    return load_setup()


@pytest.fixture
def backend():
    pytest.importorskip("setuptools")
    path = ROOT / "build_backend" / "lm2_build.py"
    spec = importlib.util.spec_from_file_location("_lm2_build_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = list(sys.meta_path)
    yield module
    sys.meta_path[:] = before


@pytest.fixture
def tree(tmp_path):
    """A copy of what a user has: the tracked files, nothing built."""
    ignored = shutil.ignore_patterns(
        ".*", "build", "*.egg-info", "__pycache__", "*.so", "_build.json", "dist"
    )
    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored))


def _python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *code.split()]
        if code.startswith("setup.py")
        else [sys.executable, "-c", code],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _said(run: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in run.stderr.splitlines() if line.startswith("lm2_kernels: ")]


def _warnings(run: subprocess.CompletedProcess[str]) -> list[str]:
    """What the compilers warn of; setuptools has warnings of its own."""
    lines = (run.stdout + run.stderr).splitlines()
    return [line for line in lines if re.search(r"(csrc\S*|ptxas|nvcc) warning", line)]


# an op forward and backward on each backend that runs here
SMOKE = """
import torch, lm2_kernels as lm2
from lm2_kernels.backends import extension
from lm2_kernels.version import sources_digest
print(lm2.__file__)
x = torch.ones(2, 3, 4, requires_grad=True)
with lm2.recording() as ran:
    lm2.memory_update(x, x, x, x, x)[0].sum().backward()
print({name for _, name in ran}, extension.cpu_reason(), extension._cuda_reason, sep="|")
"""


@needs_tools
@needs_compiler
@pytest.mark.parametrize(
    "has_cuda",
    [
        False,
        # every day test_nvcc compiles the kernels, links them and loads them
        pytest.param(
            True,
            marks=(
                pytest.mark.slow,
                pytest.mark.skipif(nvcc.nvcc_path() is None, reason="no CUDA toolkit"),
            ),
        ),
    ],
    ids=("cpu", "cuda"),
)
def test_wheel(tree, tmp_path, has_cuda):
    # what the kernels become is for other tests to see
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    compiler.chmod(0o755)
    environment = {"FORCE_CUDA": "0", "CXX": str(compiler)}
    if has_cuda:
        environment = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "NVCC_THREADS": "2"}
    code = "import sys; sys.path.insert(0, 'build_backend'); import lm2_build; "
    built = _python(f"{code}print(lm2_build.build_wheel({str(tmp_path)!r}))", tree, **environment)
    assert built.returncode == 0, built.stderr
    assert not _warnings(built)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"lm2_kernels", wheel.name.split("-cp")[0] + ".dist-info"}
    assert sum(name.endswith(".so") for name in names) == 1 + has_cuda
    assert "lm2_kernels/_build.json" in names
    assert not any("test" in name and "testing" not in name for name in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    site = tmp_path / "site"
    run = _python(SMOKE + "print(extension.build_info().get('CUDA archs'))", site)
    assert str(site) in run.stdout
    assert "{'cpp'}|None|" in run.stdout, run.stdout + run.stderr
    if not has_cuda:
        return
    record = json.loads((site / "lm2_kernels/_build.json").read_text())
    assert (record["cpu"], record["cuda"], record["cuda_archs"]) == (None, None, ["9.0"])
    assert run.stdout.endswith("9.0\n")
    if torch.version.cuda is None:
        assert "None|its CUDA kernels are built, but this torch has no CUDA" in run.stdout
    else:
        assert "None|None" in run.stdout
    # nothing is left to be found but what torch and the system bring
    code = "import torch, sys; torch.ops.load_library(sys.argv[1])"
    (library,) = (site / "lm2_kernels").glob("_cuda*.so")
    command = [sys.executable, "-c", f"import lm2_kernels; {code}", str(library)]
    subprocess.run(command, cwd=site, env=os.environ | {"LD_BIND_NOW": "1"}, check=True)


@needs_tools
def test_sdist(tree, tmp_path):
    code = "import sys; sys.path.insert(0, 'build_backend'); import lm2_build; "
    (tree / "lm2_kernels" / "_build.json").write_text("{}")
    (tree / "lm2_kernels" / "_C.so").write_text("")
    built = _python(f"{code}lm2_build.build_sdist({str(tmp_path)!r})", tree)
    assert built.returncode == 0, built.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for name in ("setup.py", "build_backend/lm2_build.py", "LICENSE", "lm2_kernels/testing/golden"):
        assert name in names
    for folder in ("csrc", "tests", "benchmarks"):
        for file in (tree / folder).rglob("*.*"):
            assert str(file.relative_to(tree)) in names
    assert not any(name.endswith((".so", "_build.json", ".pyc")) for name in names)


@needs_tools
@pytest.mark.parametrize(
    ("environment", "reason"),
    (
        ({"CXX": "/nonexistent/c++"}, "no C++ compiler: '/nonexistent/c++' does not start"),
        ({"CXX": "ccache g++"}, "no C++ compiler: 'ccache g++' does not start"),
        ({"CXX": "false"}, "'false' does not compile C++20"),
        ({"LM2_KERNELS_BUILD": "none"}, "LM2_KERNELS_BUILD=none"),
    ),
)
def test_without_compiler(tree, tmp_path, environment, reason):
    built = _python(f"setup.py -q build --build-lib {tmp_path}/site", tree, **environment)
    assert built.returncode == 0, built.stderr
    record = json.loads((tmp_path / "site/lm2_kernels/_build.json").read_text())
    assert record["cpu"] is not None
    for part in ("cpu", "cuda"):
        assert reason in record[part]
    # one clear line, none when that is what was asked for
    said = _said(built)
    assert len(said) == (0 if "LM2_KERNELS_BUILD" in environment else 1)
    assert all("The package installs and runs without" in line for line in said)
    if environment.get("CXX", "/nonexistent/c++") != "/nonexistent/c++":
        return  # to run it, one compiler that is missing is like another
    run = _python(SMOKE, tmp_path / "site")
    assert f"{{'eager'}}|its C++ kernels were not built: {record['cpu']}|" in run.stdout


@needs_tools
@needs_compiler
def test_what_does_not_compile_is_left_out(tree, tmp_path):
    # passes the probe, then fails like a compiler that is too old for something
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *csrc*) exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    command = f"setup.py -q build --build-lib {tmp_path}/site"
    built = _python(command, tree, CXX=str(compiler), FORCE_CUDA="0")
    assert built.returncode == 0, built.stderr
    assert any("cpu kernels are left out: they do not compile here" in s for s in _said(built))
    run = _python(SMOKE, tmp_path / "site")
    assert "{'eager'}|its C++ kernels were not built: they do not compile here" in run.stdout
    forced = _python(command, tree, CXX=str(compiler), LM2_KERNELS_BUILD="cpu")
    assert forced.returncode != 0


@needs_tools
@pytest.mark.parametrize(
    ("environment", "message"),
    (
        ({"LM2_KERNELS_BUILD": "all"}, "LM2_KERNELS_BUILD must be one of"),
        ({"LM2_KERNELS_BUILD": "cpu", "CXX": "/nonexistent"}, "C++ is required, but no C++"),
        ({"FORCE_CUDA": "1", "CXX": "/nonexistent"}, "C++ is required, but no C++"),
    ),
)
def test_what_is_asked_for_by_name_is_required(tree, environment, message):
    built = _python("setup.py -q build", tree, **environment)
    assert built.returncode != 0
    assert message in built.stderr


def test_a_source_tree_takes_the_installed_libraries_of_the_same_sources(tree, tmp_path):
    """README's commands run in the source tree, where `python -m` imports what is not built."""
    code = "from lm2_kernels.backends import extension as e; print(e.cpu_reason(), e._folder)"

    def run() -> str:
        found = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, cwd=tree, env=found, capture_output=True, text=True, check=True
        ).stdout

    shutil.copytree(extension._PACKAGE, tmp_path / "site" / "lm2_kernels")
    record = tmp_path / "site" / "lm2_kernels" / "_build.json"
    digest = sources_digest(ROOT / "csrc")
    record.write_text(json.dumps({"cpu": None, "cuda": "no", "sources": digest}))
    assert str(tmp_path / "site" / "lm2_kernels") in run()
    (tree / "csrc" / "ops.cpp").write_text("changed")
    assert "is of other sources; run `pip install .`" in run()
    record.unlink()
    # an installed torch's site-packages may hold a copy of its own
    assert "None" not in run()


class _Torch:
    """A torch of some version."""

    def __init__(self, version="2.11.0", cuda=None):
        self.__version__ = version
        self.version = types.SimpleNamespace(cuda=cuda)
        self.cuda = types.SimpleNamespace(is_available=lambda: False)


@pytest.mark.parametrize(
    ("text", "flags", "names"),
    (
        ("8.0", ["arch=compute_80,code=sm_80"], ["8.0"]),
        ("8.0;9.0a", ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"], None),
        ("8.0, 9.0", ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90"], ["8.0", "9.0"]),
        (
            "12.0+PTX",
            ["arch=compute_120,code=sm_120", "arch=compute_120,code=compute_120"],
            ["12.0+PTX"],
        ),
        # not one that this nvcc knows, and one too old for the kernels
        ("8.9 8.0", ["arch=compute_80,code=sm_80"], ["8.0"]),
        ("7.0;8.0", ["arch=compute_80,code=sm_80"], ["8.0"]),
    ),
)
def test_arch_list(setup, text, flags, names):
    known = {"compute_70", "compute_80", "compute_90", "compute_120"}
    found, entries = setup.split_archs(text, known)
    assert found == [f"-gencode={flag}" for flag in flags]
    assert names is None or entries == names


@pytest.mark.parametrize("text", ("ampere", "80", "8", "8.0+ptx"))
def test_arch_list_refuses(setup, text):
    with pytest.raises(setup.LeftOutError, match=r"TORCH_CUDA_ARCH_LIST has .* is not like 8.0"):
        setup.split_archs(text, {"compute_80"})


def test_toolkit_must_fit_torch(setup, monkeypatch, tmp_path):
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("#!/bin/sh\necho 'release 12.8, V12.8.93'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup.cuda_toolkit(_Torch(cuda="12.6")) == str(tmp_path)
    with pytest.raises(setup.LeftOutError, match=r"nvcc is 12.8 .* built for CUDA 13.0"):
        setup.cuda_toolkit(_Torch(cuda="13.0"))
    with pytest.raises(setup.LeftOutError, match="is a build without CUDA"):
        setup.cuda_toolkit(_Torch())
    # forced, it is compiled even so
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert setup.cuda_toolkit(_Torch()) == str(tmp_path)
    monkeypatch.setenv("FORCE_CUDA", "0")
    with pytest.raises(setup.LeftOutError, match="FORCE_CUDA=0"):
        setup.cuda_toolkit(_Torch(cuda="12.6"))


@pytest.mark.parametrize(
    ("script", "reason"),
    (("exit 1", "bin/nvcc does not run"), ("echo nothing", "names no release")),
)
def test_broken_nvcc(setup, monkeypatch, tmp_path, script, reason):
    for name in ("bin/nvcc", "targets/x86_64-linux/include/cuda_runtime.h"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup.cuda_include(str(tmp_path)) == f"{tmp_path}/targets/x86_64-linux/include"
    with pytest.raises(setup.LeftOutError, match=reason):
        setup.cuda_toolkit(_Torch(cuda="12.6"))


def test_unusable_cuda_home_is_said(setup, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    setup.toolkit()
    assert f"{tmp_path} has no bin/nvcc or no cuda_runtime.h" in capsys.readouterr().err


def test_compiler_that_nvcc_refuses_leaves_cuda_alone_out(setup, monkeypatch, tmp_path):
    """torch checks that before it builds anything: the C++ kernels must not go with it."""
    built = []

    class BuildExtension:
        def __init__(self):
            self.inplace, self.build_lib = False, str(tmp_path)
            self.extensions = [types.SimpleNamespace(name=name) for name in setup.PARTS]

        def run(self):
            self.build_extensions()

        def build_extensions(self):
            if any(extension.name == "lm2_kernels._cuda" for extension in self.extensions):
                raise RuntimeError("The current installed version of g++ (16.1) is greater")
            built.extend(extension.name for extension in self.extensions)

    record = {"cpu": None, "cuda": None}
    command = setup.builder(types.SimpleNamespace(BuildExtension=BuildExtension), record)
    command().run()
    assert built == ["lm2_kernels._C"]
    assert record["cpu"] is None
    assert "do not compile here" in record["cuda"]
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(RuntimeError, match=r"16\.1"):
        command().run()


def test_what_an_earlier_build_left_is_taken_away(setup, tmp_path):
    for name in ("_C.cpython-311.so", "_cuda.cpython-311.so", "ops.py"):
        (tmp_path / name).touch()
    setup.write_record(tmp_path, {"cpu": None, "cuda": "why not"})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"_C.cpython-311.so", "ops.py", "_build.json"}


def test_no_toolkit(setup, monkeypatch):
    monkeypatch.setattr(setup, "toolkit", lambda: None)
    with pytest.raises(setup.LeftOutError, match="no CUDA toolkit"):
        setup.cuda_toolkit(_Torch(cuda="12.6"))


@needs_tools
def test_old_torch_is_refused(setup, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    with pytest.raises(setup.LeftOutError, match=r"torch 2\.10\.1\+cu128 is older than 2\.11"):
        setup.import_torch()


def test_backend_finds_this_torch(backend):
    found = backend._ask(sys.executable)
    assert found["version"] == torch.__version__
    assert found["python"] == list(sys.version_info[:2])
    assert any((Path(folder) / "torch/version.py").exists() for folder in found["path"])
    assert backend._ask("/nonexistent/python") is None
    assert backend._ask("/bin/false") is None


def test_backend_asks_the_target_first(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{tmp_path / 'one'}{os.pathsep}{tmp_path / 'two'}")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "python").touch()
    monkeypatch.chdir(tmp_path)
    wanted = [sys.executable, *(str(tmp_path / name / "python") for name in ("one", "two"))]
    assert list(backend._candidates())[:3] == wanted
    # pip runs the build with the target's own interpreter
    monkeypatch.setenv("PIP_BUILD_TRACKER", "x")
    assert list(backend._candidates()) == [sys.executable]
    monkeypatch.setenv("LM2_KERNELS_TORCH_PYTHON", "/some/python")
    assert list(backend._candidates()) == ["/some/python"]


def _answers(monkeypatch, backend, version, python=None):
    answer = {"version": version, "python": list(python or sys.version_info[:2]), "path": ["/x"]}
    monkeypatch.setattr(backend, "_ask", lambda _: version and answer)
    # as in an isolated build
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda _: None)


def test_backend_takes_torch_from_the_target(backend, monkeypatch, capsys):
    _answers(monkeypatch, backend, "2.12.0+cu130")
    assert backend._requirements(["ninja"]) == ["ninja"]
    assert "building against torch 2.12.0+cu130" in capsys.readouterr().err
    assert isinstance(sys.meta_path[-1], backend._Fallback)
    # submodules come by their package's own path
    assert sys.meta_path[-1].find_spec("a.b", ["/somewhere"]) is None


@pytest.mark.parametrize(
    ("version", "python", "said"),
    (
        ("2.10.0", None, "torch 2.10.0 of .* is older than torch>=2.11: not used"),
        ("2.12.0", (3, 9), "taken as a build requirement, a large download"),
        (None, None, "taken as a build requirement, a large download"),
    ),
)
def test_backend_requires_torch_where_there_is_none(
    backend, monkeypatch, capsys, version, python, said
):
    _answers(monkeypatch, backend, version, python)
    assert backend._requirements(["ninja"]) == ["ninja", "torch>=2.11"]
    assert re.search(said, capsys.readouterr().err)


def test_backend_needs_no_torch_for_pure_python(backend, monkeypatch, capsys):
    _answers(monkeypatch, backend, None)
    monkeypatch.setenv("LM2_KERNELS_BUILD", "none")
    assert backend._requirements(["ninja"]) == ["ninja"]
    assert not capsys.readouterr().err
    # FORCE_CUDA wins, as it does in setup.py
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert backend._requirements(["ninja"]) == ["ninja", "torch>=2.11"]


@pytest.mark.parametrize(
    ("archs", "capability", "covered"),
    (
        (["8.0"], (8, 0), True),
        (["8.0"], (8, 9), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), True),
        (["7.5+PTX"], (8, 0), True),
        (["7.5"], (8, 0), False),
        (["12.0+PTX"], (9, 0), False),
        (["9.0a"], (9, 0), True),
        (["10.0a"], (10, 3), False),
        ([], (9, 0), False),
    ),
)
def test_archs_cover_a_gpu(archs, capability, covered):
    assert extension._covers(archs, capability) == covered


@pytest.mark.parametrize(("torch_version", "triton_version"), PINNED_TRITON.items())
def test_no_requirement_replaces_torch_or_triton(torch_version, triton_version):
    """Whatever pair pip finds installed satisfies the package and each of its extras."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = {"torch": torch_version, "triton": triton_version}
    for extra, texts in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for requirement in map(Requirement, texts):
            version = installed.get(requirement.name)
            assert version is None or requirement.specifier.contains(version), (extra, requirement)
            assert extra == "" or requirement.name != "torch"
            # an own entry would bring in another extra's
            assert requirement.name != project["name"]
