"""Values that several commands take."""

import argparse

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
