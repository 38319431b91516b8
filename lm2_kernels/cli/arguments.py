"""Values that several commands take."""

import argparse


def seed(text: str) -> int:
    """A seed that every generator takes."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is no integer from 0 to 2**63 - 1")
    return value
