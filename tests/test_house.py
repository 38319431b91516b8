"""The package's rooms: imports point down the list in CONTRIBUTING, and no files form a circle."""

import ast
import graphlib
import re
from pathlib import Path

from lm2_kernels.backends import NAMES

ROOT = Path(__file__).parent.parent
PACKAGE = "lm2_kernels"


def _modules() -> dict[str, Path]:
    files = (ROOT / PACKAGE).rglob("*.py")
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def _imports(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Which modules each imports by name, at its top or later."""
    found = {}
    for module, path in modules.items():
        found[module] = imported = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                for name in node.names:
                    whole = f"{node.module}.{name.name}"
                    imported.add(whole if whole in modules else node.module)
        found[module] = {name for name in imported if name.split(".")[0] == PACKAGE}
    return found


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else PACKAGE


MODULES = _modules()
IMPORTS = _imports(MODULES)


def test_no_circle():
    graphlib.TopologicalSorter(IMPORTS).prepare()


def test_imports_point_down():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    (block,) = re.findall(r"^```rooms\n(.*?)^```", text, re.DOTALL | re.M)
    rooms = block.split()
    assert sorted(rooms) == sorted({_room(module) for module in MODULES} - {PACKAGE})
    for module, imported in IMPORTS.items():
        for other in imported:
            here, there = _room(module), _room(other)
            # the package hands names on, and nothing inside asks it for them
            assert there != PACKAGE, f"{module} imports {PACKAGE} itself"
            if here not in (PACKAGE, there):
                assert rooms.index(here) < rooms.index(there), f"{module} imports {other}"


def test_the_oracle_imports_torch_alone():
    assert not IMPORTS[f"{PACKAGE}.reference"]


def test_backends_do_not_import_one_another():
    backends = set(NAMES)
    for module, imported in IMPORTS.items():
        path = module.split(".")
        if path[1:2] == ["backends"] and path[2:3] and path[2] in backends:
            others = {other.split(".")[2] for other in imported if other.count(".") >= 2}
            assert not others & (backends - {path[2]}), module
