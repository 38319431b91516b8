"""README's Python blocks run as they stand, and the files that the documents name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_block_runs(block):
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("document", ("README.md", "CONTRIBUTING.md"))
def test_named_files_exist(document):
    text = (ROOT / document).read_text()
    named = set(re.findall(r"`((?:[\w.]+/)*[\w]+\.(?:py|md))`", text)) - {"train.py"}
    assert named
    for name in named:
        places = (ROOT, ROOT / "lm2_kernels", ROOT / "lm2_kernels/backends")
        assert any((place / name).exists() for place in places), name
