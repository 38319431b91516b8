"""The documents are true: their Python runs, and the commands, files and links in them exist."""

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
MAX_README_LINES = 220
# what a build of the site imports
_MKDOCS = ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml", "matplotlib")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.DOTALL | re.M)


README_BLOCKS = _blocks(ROOT / "README.md", "python")


@pytest.mark.parametrize("block", README_BLOCKS, ids=range(len(README_BLOCKS)))
def test_readme_block_runs(block, tmp_path, monkeypatch):
    """Each by itself, as it stands."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("page", [p for p in PAGES if _blocks(p, "python")], ids=_name)
def test_page_runs(page, tmp_path, monkeypatch):
    """A page's blocks, one after the other, as a reader would run them."""
    for name in ("transformers", "peft", "accelerate"):
        if f"import {name}\n" in page.read_text("utf-8"):
            pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(_blocks(page, "python")):
        exec(compile(block, f"{_name(page)}, block {number}", "exec"), names)


def _commands() -> list[list[str]]:
    """The arguments of all commands of the documents."""
    commands = []
    for document in DOCUMENTS:
        for block in _blocks(document, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.search(r"-m lm2_kernels( .*|$)", line.split("#")[0])
                commands += [found[1]] if found else []
    return [[part.strip("\"'") for part in _split(command)] for command in commands]


def test_commands_exist():
    """What the documents ask `python -m lm2_kernels` for is what it takes."""
    from lm2_kernels.cli import _parser

    commands = _commands()
    assert commands
    for command in commands:
        _parser().parse_args(command)


def test_tasks_can_be_trained_on(tmp_path, monkeypatch):
    """A run of the documents that takes no file is planned as it stands; nothing is trained."""
    from lm2_kernels.cli import _parser, train

    monkeypatch.chdir(tmp_path)
    planned = 0
    for command in _commands():
        options = _parser().parse_args(command)
        if command[:1] != ["train"] or not options.tasks or options.babi or options.background:
            continue
        with contextlib.ExitStack() as held:
            train._planned(options, held, 0, 1)
        planned += 1
    assert planned >= 2
    assert not list(tmp_path.iterdir())


def _split(command: str) -> list[str]:
    return re.findall(r"\"[^\"]*\"|'[^']*'|\S+", command.split("&&", maxsplit=1)[0])


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_named_files_exist(document):
    text = document.read_text("utf-8")
    named = set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|cpp|h|cu|toml|yml))`", text))
    places = (ROOT, ROOT / "lm2_kernels", ROOT / "lm2_kernels/backends", ROOT / "csrc")
    for name in named - {"train.py"}:
        assert any((place / name).exists() for place in places), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_links_lead_somewhere(document):
    text = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.DOTALL | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http:", "https:", "#")):
            assert (document.parent / target.split("#")[0]).exists(), target


def test_readme_is_short():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= MAX_README_LINES


def _tree() -> dict[str, list[str]]:
    """CONTRIBUTING's tree: the entries of each folder that it opens."""
    (block,) = _blocks(ROOT / "CONTRIBUTING.md", "tree")
    folders: dict[str, list[str]] = {"": []}
    path: list[str] = []
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        path[depth:] = [name]
        folders.setdefault("".join(path[:-1]), []).append(name)
    return folders


@pytest.mark.parametrize("folder", sorted(set(_tree()) - {""}))
def test_contributing_has_the_tree(folder):
    listed = set(_tree()[folder])
    is_open = "..." in listed
    built = {"__pycache__", "_build.json"}
    there = {
        entry.name + "/" * entry.is_dir()
        for entry in (ROOT / folder).iterdir()
        if entry.name not in built and entry.suffix != ".so"
    }
    assert listed - {"..."} <= there
    assert is_open or there - listed <= {"__init__.py"}


def test_every_public_name_is_in_the_reference():
    import lm2_kernels

    text = "".join(path.read_text("utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: lm2_kernels\.(\w+)", text, re.M))
    assert set(lm2_kernels.__all__) - {"__version__"} <= shown


def _mkdocs_reason() -> str | None:
    """Why the site cannot be built here."""
    for name in _MKDOCS:
        parent = name.partition(".")[0]
        if importlib.util.find_spec(parent) is None or importlib.util.find_spec(name) is None:
            return f'{name} is not installed; pip install ".[docs]"'
    return None


@pytest.mark.skipif(_mkdocs_reason() is not None, reason=str(_mkdocs_reason()))
def test_site_builds(tmp_path):
    """Strictly: a page, a link, an anchor or a name that is missing is an error."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = [path.read_text("utf-8") for path in tmp_path.rglob("*.html")]
    # a script, a font or a picture from elsewhere would be missing without a network
    loads = r'(?:src|rel="(?:icon|stylesheet|preconnect)" href)="?https?:[^"> ]+'
    assert not [load for page in pages for load in re.findall(loads, page)]
    layers = (tmp_path / "layers.html").read_text("utf-8")
    assert "<math" in layers and "\\begin" not in layers
    assert "</svg>" in (tmp_path / "study.html").read_text("utf-8").partition('class="picture"')[2]
    reference = (tmp_path / "api" / "layers.html").read_text("utf-8")
    assert "Shapes, used everywhere" in reference
    # a class with its defaults
    assert "num_heads: int = 8" in re.sub(r"<[^>]+>", "", reference)
