"""What the site's build does beyond mkdocs' own: formulas without a script, docstrings as Markdown.

``mkdocs.yml`` names this file twice: as a hook, for fences of formulas, and as an extension of
griffe, which reads the docstrings.
"""

import re

import griffe
from latex2mathml.converter import convert

# a docstring's cross references, :class:`~a.b.Name`, and the colons before its literal blocks
_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")
_LITERAL = re.compile(r"::$", re.MULTILINE)


def _formula(source: str, *_args: object, **_options: object) -> str:
    """A fence of LaTeX as MathML, which browsers show without a script or a network."""
    return f'<div class="formula">{convert(source, display="block")}</div>'


def on_config(config):
    """Have fences called ``math`` rendered by :func:`_formula`."""
    fence = {"name": "math", "class": "formula", "format": _formula}
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences.setdefault("custom_fences", []).append(fence)
    return config


class PlainDocstrings(griffe.Extension):
    """Docstrings have Sphinx's roles: here they are code."""

    def on_object(self, *, obj: griffe.Object, **_options: object) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = _LITERAL.sub(":", text)
