"""What the site's build does beyond mkdocs' own: formulas, pictures of the study, docstrings.

Formulas need no script. Pictures are drawn from the committed lines. Docstrings are read as
Markdown. ``mkdocs.yml`` names this file twice: as a hook, for fences of formulas and pictures, and
as an extension of griffe, which reads the docstrings.
"""

import importlib
import io
import re
import sys
from pathlib import Path

import griffe
from latex2mathml.converter import convert

# a docstring's cross references, :class:`~a.b.Name`, and the colons before its literal blocks
_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")
_LITERAL = re.compile(r"::$", re.MULTILINE)


def _formula(source: str, *_args: object, **_options: object) -> str:
    """A fence of LaTeX as MathML, which browsers show without a script or a network."""
    return f'<div class="formula">{convert(source, display="block")}</div>'


def _picture(source: str, *_args: object, **_options: object) -> str:
    """A fence with the name of a picture of ``benchmarks/study_report.py``, as SVG in the page."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    written = io.StringIO()
    importlib.import_module("study_report").draw(source.strip(), written)
    text = written.getvalue()
    return f'<div class="picture">{text[text.index("<svg") :]}</div>'


def on_config(config):
    """Have fences called ``math`` and ``picture`` rendered by these functions."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    for name, function in (("math", _formula), ("picture", _picture)):
        fence = {"name": name, "class": name, "format": function}
        fences.setdefault("custom_fences", []).append(fence)
    return config


class PlainDocstrings(griffe.Extension):
    """Docstrings have Sphinx's roles: here they are code."""

    def on_object(self, *, obj: griffe.Object, **_options: object) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = _LITERAL.sub(":", text)
