"""What the package says of itself: versions that agree, and what a wheel and an sdist carry."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import lm2_kernels as lm2
from tools.compiling import ROOT

BUILD_TOOLS = ("setuptools", "pybind11", "ninja")
_MISSING = [name for name in BUILD_TOOLS if importlib.util.find_spec(name) is None]


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_newest_release_of_the_changelog_is_this_version():
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", _text("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    version, date = headings[1]
    assert version == lm2.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)


def test_citation_is_of_this_version_and_of_the_paper():
    text = _text("CITATION.cff")
    (version,) = re.findall(r"^version: (\S+)$", text, re.MULTILINE)
    assert version == lm2.__version__
    (date,) = re.findall(r"^date-released: (\S+)$", text, re.MULTILINE)
    assert f"## [{version}] - {date}" in _text("CHANGELOG.md")
    assert "value: arXiv:2502.06049" in text


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a wheel and an sdist; pure Python, as compiling is for test_build to try."""
    if _MISSING:
        pytest.skip(f"not installed: {_MISSING}")
    folder = tmp_path_factory.mktemp("metadata")
    ignored = shutil.ignore_patterns(
        ".*", "build", "*.egg-info", "__pycache__", "*.so", "_build.json", "dist", "tests"
    )
    tree = shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    code = (
        "import sys; sys.path.insert(0, 'build_backend'); import lm2_build; "
        f"lm2_build.build_sdist({str(folder)!r}); lm2_build.build_wheel({str(folder)!r})"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=environment | {"LM2_KERNELS_BUILD": "none"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return folder


def test_wheel_has_the_marker_of_its_types(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        assert "lm2_kernels/py.typed" in wheel.namelist()
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Version"] == lm2.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def test_sdist_has_what_lies_beside_the_package(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "lm2_kernels/py.typed"} <= names
