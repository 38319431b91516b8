"""Values that several commands take."""

import argparse
import re

from lm2_kernels.checks import SEEDS


def seed(text: str) -> int:
    """A seed that every generator takes."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value not in SEEDS:
        raise argparse.ArgumentTypeError(f"{text} is no integer from 0 to 2**63 - 1")
    return value


def length(text: str) -> int:
    """A number of tokens: 1500, or in thousands or millions, 4k."""
    found = re.fullmatch(r"(\d+)([kKmM]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no length such as 0k, 4k or 1500")
    return int(found[1]) * {"": 1, "k": 1000, "m": 1_000_000}[found[2].lower()]
