"""``python -m lm2_kernels``: ``info`` says what runs here, ``verify`` whether it is right, ``demo``
what a memory is good for, ``bench`` how fast it is, ``plan`` what a model takes; ``train`` and
``generate`` are for models of your own, and ``evaluate`` asks any what they remember.

Exit codes: 0 all right, 1 a check failed, 2 what was asked for cannot be done, 130 Ctrl-C ended
it, 143 SIGTERM or 129 SIGHUP ended ``train`` or ``evaluate``, 141 who read the output stopped
reading. What cannot be done, and what was ended, is one line on standard error.
"""

import argparse
import io
import os
import re
import signal
import sys
from collections.abc import Sequence

from lm2_kernels.cli.bench import add_bench
from lm2_kernels.cli.demo import add_demo
from lm2_kernels.cli.evaluate import add_evaluate
from lm2_kernels.cli.generate import add_generate
from lm2_kernels.cli.info import add_info
from lm2_kernels.cli.plan import add_plan
from lm2_kernels.cli.train import add_train
from lm2_kernels.cli.verify import add_verify
from lm2_kernels.terminal import say
from lm2_kernels.testing.cases import Case
from lm2_kernels.version import __version__

PROGRAM = "python -m lm2_kernels"
# added to the number of the signal that ended a program, as shells do
_SIGNAL = 128


def main(arguments: Sequence[str] | None = None, *, cases: Sequence[Case] | None = None) -> int:
    """Run the command line and return its exit code; ``cases`` replaces those ``verify`` runs."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a character that a terminal cannot show ends no work
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(arguments, cases)
        finally:
            # here, where it can be caught, and not at exit
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        # nobody reads on, or the disk is full: what is left in the buffer has no place
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return _SIGNAL + signal.SIGPIPE
        say(f"{PROGRAM}: error: {error}")
        return 2


def _run(arguments: list[str], cases: Sequence[Case] | None) -> int:
    options = argparse.Namespace(arguments=arguments, cases=cases)
    _parser().parse_args(arguments, options)
    try:
        return options.run(options)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as error:
        _say_error(options, str(error) or "interrupted")
        return _SIGNAL + getattr(error, "number", signal.SIGINT)
    except (OSError, TypeError, ValueError, ArithmeticError, MemoryError) as error:
        _say_error(options, str(error) or type(error).__name__)
        return 2
    except RuntimeError as error:
        # as torch tells it of a GPU and of a CPU
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        _say_error(options, str(error))
        return 2


def _say_error(options: argparse.Namespace, text: str) -> None:
    lines = (line.strip() for line in text.splitlines())
    say(f"{PROGRAM} {options.command}: error: {'; '.join(line for line in lines if line)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="LM2 memory layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"lm2_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    adders = (add_info, add_verify, add_demo, add_plan, add_train, add_generate, add_evaluate)
    for add in (*adders, add_bench):
        add(commands)
    return parser
