"""``python -m lm2_kernels evaluate``: how many questions about long contexts a model answers."""

import argparse
import time
from pathlib import Path

import torch

from lm2_kernels import machine
from lm2_kernels.cli.arguments import length, seed
from lm2_kernels.cli.signals import Interrupted, Stop
from lm2_kernels.evaluation.asking import PROMPTS, ask
from lm2_kernels.evaluation.babilong import DATASET
from lm2_kernels.evaluation.reading import load_reader
from lm2_kernels.evaluation.results import KEYS, Results, check_plots
from lm2_kernels.evaluation.tasks import NAMES, task
from lm2_kernels.terminal import Bar, check_json

_TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")
# at most so many seconds of answers are lost when the command is killed
_SAVE_EVERY = 5.0
_DTYPES = ("float32", "bfloat16", "float16")


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """The ``evaluate`` command's arguments."""
    parser = commands.add_parser(
        "evaluate", help="ask a model questions about long contexts, and count right answers"
    )
    parser.add_argument(
        "model",
        help="the folder that train or demo wrote, or that of a model of transformers and its "
        "tokenizer; or user/model on the Hugging Face Hub",
    )
    parser.add_argument(
        "--memory",
        metavar="FOLDER",
        help="with the memory that save_pretrained wrote there, for a model of transformers; as "
        "the model's own folder has it unless given",
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="TOKENS",
        help="a model of transformers reads the prompt by windows of so many tokens, its memory "
        "carried from one to the next (without a memory: the last window alone)",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=_TASKS,
        metavar="TASK",
        help=f"of {', '.join(NAMES)} ({' '.join(_TASKS)})",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=length,
        default=(0,),
        metavar="LENGTH",
        help="tokens of the context as it is read, 4k is 4000; 0k is the facts alone (0k)",
    )
    parser.add_argument(
        "--babi",
        type=Path,
        metavar="FOLDER",
        help=f"of bAbI's own files, or {DATASET}, which datasets loads; else qa1 to qa10 are made",
    )
    parser.add_argument(
        "--background", type=Path, metavar="FILE", help="text between the facts; else it is made"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=500,
        help="of each task and length; fewer where some of these are the same (500)",
    )
    parser.add_argument("--batch", type=int, default=8, help="prompts that are read together (8)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=20,
        help="of an answer, at most, where the prompt has an instruction (20)",
    )
    parser.add_argument(
        "--prompt",
        choices=PROMPTS,
        help="with an instruction and examples, context and question alone, or these in segments "
        "of their own; as the model was trained, if train says so, or else the first, or the "
        "second for models that know words of a list alone",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the questions (0)")
    parser.add_argument(
        "--device", choices=machine.device_choices(), help="where; else the best there is"
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights; else as they are loaded")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write everything here; what is there from the same options is not asked again",
    )
    parser.add_argument("--answers", action="store_true", help="into --json, each of them")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw it into this folder")
    parser.set_defaults(run=run_evaluate)


def run_evaluate(options: argparse.Namespace) -> int:
    """Ask, and show how many answers were right."""
    # before the work, not after it
    check_json(options.json, KEYS)
    if options.plots is not None:
        check_plots(options.plots)
    if options.answers and options.json is None:
        raise ValueError("--answers go into a file: give --json")
    if options.device is not None:
        machine.check_device(options.device)
    texts = {"babi": options.babi, "background": options.background}
    tasks = [
        task(name, seed=options.seed, validation=True, **texts)
        for name in dict.fromkeys(options.tasks)
    ]
    reader = load_reader(
        options.model,
        memory=options.memory,
        window=options.window,
        device=options.device,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
    )
    saved = time.monotonic()

    def after(results: Results, is_done: bool) -> bool:
        nonlocal saved
        is_over = stop.number is not None
        if options.json is not None and (
            is_done or is_over or time.monotonic() - saved > _SAVE_EVERY
        ):
            results.write(options.json)
            saved = time.monotonic()
        return is_over

    there = {name: path and str(path) for name, path in texts.items()}
    with Stop(is_on=True) as stop:
        try:
            results = ask(
                reader,
                tasks,
                list(dict.fromkeys(options.lengths)),
                samples=options.samples,
                batch=options.batch,
                tokens=options.tokens,
                prompt=options.prompt,
                keep_answers=options.answers,
                results=_earlier(options.json),
                notes={"seed": options.seed, **there},
                command=options.arguments,
                progress=Bar,
                after=after,
            )
        except ImportError as error:
            # of what reads published data
            raise ValueError(str(error)) from None
        if stop.number is not None and not all(cell.is_done for cell in results.cells):
            how = "nothing was saved (--json)"
            if options.json is not None:
                how = f"the answers are in {options.json}: the same command goes on from there"
            raise Interrupted(f"interrupted; {how}", stop.number)
    print(results.table())
    if options.plots is not None:
        print(*results.plot(options.plots, f"Right answers of {options.model}"), sep="\n")
    return 0


def _earlier(path: Path | None) -> Results | None:
    """What a file of results holds, if there is one."""
    if path is None or not path.is_file() or path.stat().st_size == 0:
        return None
    return Results.read(path)
