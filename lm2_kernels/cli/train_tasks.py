"""``train``'s options of tasks: what is learnt where no files are given."""

import argparse
from pathlib import Path

from lm2_kernels.cli.arguments import length
from lm2_kernels.evaluation.layout import LAYOUTS, LOSSES
from lm2_kernels.evaluation.lessons import TOKENIZERS
from lm2_kernels.training.curriculum import SCHEDULES

# which files do not have
OF_TASKS = (
    "lengths",
    "segments",
    "curriculum",
    "loss",
    "layout",
    "tokenizer",
    "babi",
    "background",
)


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """The arguments, none of which has a default of its own."""
    group = parser.add_argument_group("tasks for the memory, in the place of files")
    group.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="qa1 to qa20 of bAbI (without --babi to qa10), niah, niah_multikey, vt, mqar, stories",
    )
    group.add_argument(
        "--lengths",
        nargs="+",
        type=length,
        metavar="LENGTH",
        help="tokens of the context, 4k is 4000; 0k is the facts alone",
    )
    group.add_argument(
        "--segments", nargs="+", type=int, metavar="N", help="or its segments, as many each (1)"
    )
    group.add_argument(
        "--curriculum", choices=SCHEDULES, help=f"when which of these ({SCHEDULES[0]})"
    )
    group.add_argument("--loss", choices=LOSSES, help=f"on answers alone, or on all ({LOSSES[0]})")
    group.add_argument(
        "--layout",
        choices=LAYOUTS,
        help=f"facts and question in segments of their own, or as they come ({LAYOUTS[0]})",
    )
    group.add_argument("--tokenizer", choices=TOKENIZERS, help="(words; bytes with a --background)")
    group.add_argument("--babi", type=_place, metavar="FOLDER", help="bAbI's own files")
    group.add_argument("--background", type=_place, metavar="FILE", help="text between the facts")


def _place(text: str) -> str:
    # as run.json has it
    return str(Path(text).resolve())
