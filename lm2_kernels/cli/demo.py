"""The demo: a small LM2 learns from nothing to answer questions that only its memory can answer.

:func:`run` trains two models on the same batches, one with memory layers and one without, and says
how many questions about stories that neither has seen they answer. :func:`compare_with_released`
then times the released way to compute the memory layer beside this package's.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import itertools
import os
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lm2_kernels import figures, telemetry
from lm2_kernels.bench import measure
from lm2_kernels.bench.peers import ReleasedStyleMemory
from lm2_kernels.bench.works import Row
from lm2_kernels.checks import check_int
from lm2_kernels.cli.arguments import seed as _seed
from lm2_kernels.evaluation.accuracy import Accuracy
from lm2_kernels.evaluation.stories import Example, QATask
from lm2_kernels.functional import initial_memory
from lm2_kernels.machine import best_device
from lm2_kernels.model.config import LM2Config
from lm2_kernels.model.decoder import LM2ForCausalLM
from lm2_kernels.patching.swap import swap_memory
from lm2_kernels.state.files import read_json
from lm2_kernels.terminal import StepBar, check_writable, columns, write_json
from lm2_kernels.training.data import save_tokenizer
from lm2_kernels.training.loop import train

__all__ = [
    "Comparison",
    "Outcome",
    "Report",
    "compare_with_released",
    "render",
    "render_comparison",
    "run",
]

TASK = QATask()
SLOTS = 8
STEPS = 900
BATCH = 32
QUESTIONS = 4
LEARNING_RATE, FLOOR = 2e-3, 0.3
VALIDATION = 500  # stories of each hop
_VALIDATION_SEED = 1_000_003
_ROPE_THETA = 10.0
_REPORT = "report.json"
# by which a report is known
_KEYS = ("seed", "task", "models", "baselines")
_PLOTS = ("losses.png", "losses.svg", "reads.png", "reads.svg")


def add_demo(commands: argparse._SubParsersAction) -> None:
    """The ``demo`` command's arguments."""
    parser = commands.add_parser("demo", help="train a small LM2 to remember, in two minutes")
    parser.add_argument("--out", type=Path, default=Path("lm2_demo"), help="a folder (lm2_demo)")
    parser.add_argument("--seed", type=_seed, default=0, help="of weights and stories (0)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"({STEPS})")
    parser.set_defaults(run=run_demo)


def run_demo(options: argparse.Namespace) -> int:
    """Train with and without memory, and compare the layer with the released way."""
    report = run(options.out, seed=options.seed, steps=options.steps, progress=StepBar)
    print(render(report))
    print()
    print(render_comparison(compare_with_released()))
    return 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one model's training."""

    name: str
    parameters: int
    losses: list[float]
    seconds: float
    accuracy: dict[int, Accuracy]  # by hops


@dataclasses.dataclass(frozen=True)
class Answer:
    """A question to the trained model."""

    story: str
    question: str
    answer: str
    truth: str
    prompt: str  # what the model reads, padding and all


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`run` returns."""

    outcomes: tuple[Outcome, Outcome]  # with memory, without
    baselines: dict[str, dict[int, Accuracy]]  # by name and hops: answers without a model
    answers: list[Answer]
    model: Path  # the checkpoint's folder
    plots: list[Path]  # of the losses, and of what the memory is read for
    notes: list[str]


def run(
    out_dir: str | Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    validation: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[str], StepBar] | None = None,
) -> Report:
    """Train with and without memory on equal data, and compare on stories kept for validation.

    Both start from the same weights and take the same steps. The memory has a third as many slots
    as a segment has tokens.

    Writes into ``out_dir``: the trained model, ``report.json``, and if there is matplotlib pictures
    as PNG and SVG: ``losses``, and ``reads``, which shows where in its memory the model finds an
    answer.

    Args:
        out_dir: a folder, made if need be.
        seed: of the weights and of the training stories; validation is the same for all seeds.
        steps: of training, each model's.
        validation: stories asked after, of each hop; 500 unless given.
        device: where; a GPU if there is one.
        progress: makes the progress bar of a model's training from its name
            (:class:`lm2_kernels.terminal.StepBar`); None shows nothing.
    """
    check_int("demo", "steps", steps, 1)
    validation = VALIDATION if validation is None else validation
    check_int("demo", "validation", validation, 1)
    out_dir = Path(out_dir)
    _check_folder(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    check_writable(out_dir / _REPORT)
    questions = {
        hops: list(
            itertools.islice(
                TASK.examples(_VALIDATION_SEED, hops=hops, validation=True), validation
            )
        )
        for hops in (1, 2)
    }
    source = TASK.batches(BATCH, seed, questions=QUESTIONS)
    batches = list(itertools.islice(source, steps))  # the same for both models
    outcomes = []
    model, plain = (model.to(device or best_device()) for model in _models(seed))
    for name, trained in (("with memory", model), ("without", plain)):
        outcomes.append(_train(name, trained, batches, questions, progress))
    baselines = _baselines(questions)
    # first: it says of the others whose they are
    _write_report(out_dir / _REPORT, outcomes, baselines, seed)
    model.save(out_dir / "model")
    save_tokenizer(out_dir / "model", TASK.vocabulary)
    answers = _answer(out_dir / "model", [questions[1][0], questions[2][0]])
    drawn, notes = [], []
    try:
        figures.figure_class("demo")
    except ValueError as error:
        notes.append(f"no pictures: {error}")
    else:
        drawn.append(_plot(outcomes, out_dir / "losses")[0])
        drawn.append(_plot_reads(model, questions[2][0], answers[1], out_dir / "reads")[0])
    return Report(tuple(outcomes), baselines, answers, out_dir / "model", drawn, notes)


def _check_folder(folder: Path) -> None:
    """Raise ValueError unless what the demo would write over is an earlier demo's."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is no folder")
    there = [name for name in (_REPORT, "model", *_PLOTS) if os.path.lexists(folder / name)]
    if not there:
        return
    with contextlib.suppress(OSError, ValueError):
        if set(_KEYS) <= set(read_json(folder / _REPORT)):
            return
    raise ValueError(
        f"--out {folder} holds {there[0]}, which is not of an earlier demo: take another folder"
    )


def render(report: Report) -> str:
    """The text that the command prints."""
    rows = [["", "parameters", "1 hop", "2 hops", "last loss", "trained in"]]
    for outcome in report.outcomes:
        last = statistics.fmean(outcome.losses[-20:])
        rows.append(
            [
                outcome.name,
                f"{outcome.parameters:,}",
                *_shares(outcome.accuracy),
                f"{last:.3f}",
                f"{outcome.seconds:.0f} s",
            ]
        )
    rows += [[name, "", *_shares(by_hops)] for name, by_hops in report.baselines.items()]
    total = report.outcomes[0].accuracy[1].total
    lines = [
        f"right answers about {total} stories for each hop that were not trained on",
        "(without memory a model sees the segment of the question alone)",
    ]
    lines += [f"  {line}" for line in columns(_filled(rows))]
    for asked in report.answers:
        lines += [
            "",
            f"  {asked.story}",
            f"  {asked.question} {asked.answer}  (true: {asked.truth})",
        ]
    last = report.answers[-1]
    lines += [
        "",
        f"the model with memory is in {report.model}; ask it yourself:",
        f"  python -m lm2_kernels generate {shlex.quote(str(report.model))} --temperature 0 "
        f"--tokens {len(last.truth.split())} --prompt '{last.prompt}'",
        f"  python -m lm2_kernels evaluate {shlex.quote(str(report.model))} --tasks stories "
        f"--lengths 0k --prompt aligned",
    ]
    if report.plots:
        losses, reads = report.plots
        lines += [f"the losses are in {losses}", f"where it finds the last answer, in {reads}"]
    return "\n".join(lines + report.notes)


def _models(seed: int) -> tuple[LM2ForCausalLM, LM2ForCausalLM]:
    """The model with memory layers and the one without, which starts from the same weights."""
    config = LM2Config(
        vocab_size=TASK.vocabulary.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        rope_theta=_ROPE_THETA,
        memory_slots=SLOTS,
        segment_length=TASK.segment_length,
        memory_heads=4,
        formulation="paper",
        flow="time",
        write="chunk",
        candidate="token",
        memory_init="learned",
        initializer_range=0.125,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LM2ForCausalLM(config)
    plain = LM2ForCausalLM(dataclasses.replace(config, memory_layers=()))
    weights = model.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    return model, plain


def _train(
    name: str,
    model: LM2ForCausalLM,
    batches: Sequence[dict[str, Tensor]],
    questions: dict[int, list[Example]],
    progress: Callable[[str], StepBar] | None,
) -> Outcome:
    bar = None if progress is None else progress(name)
    start = time.monotonic()
    try:
        losses = train(
            model,
            batches,
            steps=len(batches),
            lr=LEARNING_RATE,
            floor=FLOOR,
            warmup=min(30, len(batches)),
            progress=bar,
        )
    finally:
        if bar is not None:
            bar.close()
    seconds = time.monotonic() - start
    accuracy = {hops: _accuracy(model, asked) for hops, asked in questions.items()}
    count = sum(parameter.numel() for parameter in model.parameters())
    return Outcome(name, count, losses, seconds, accuracy)


@torch.no_grad()
def _accuracy(model: LM2ForCausalLM, examples: Sequence[Example]) -> Accuracy:
    """How often the place is right, after the first words of the answer as the model gave them.

    The examples have one question each, all of the same number of hops.
    """
    model.eval()
    batch, device = TASK.collate(examples), next(model.parameters()).device
    ids, places = batch["input_ids"].to(device), batch["labels"][:, -1].to(device)
    for word in range(-examples[0].questions[0].hops, 0):
        # by forward, which the model without memory has too
        ids[:, word] = model(ids).logits[:, word - 1].argmax(-1)
    return Accuracy(int((ids[:, -1] == places).sum()), len(examples))


def _baselines(questions: dict[int, list[Example]]) -> dict[str, dict[int, Accuracy]]:
    """Answers that need no model: the commonest one, and the place that the story names last."""
    commonest, last = {}, {}
    for hops, examples in questions.items():
        answers = [example.questions[0].answer[-1] for example in examples]
        # counted on the validation stories themselves, which favours the baseline
        commonest[hops] = Accuracy(max(collections.Counter(answers).values()), len(answers))
        named = (
            next(words[2] for words in reversed(example.sentences) if words[1] == "entered")
            for example in examples
        )
        last[hops] = Accuracy(sum(map(str.__eq__, named, answers)), len(answers))
    return {"commonest answer": commonest, "place named last": last}


def _answer(folder: Path, examples: Sequence[Example]) -> list[Answer]:
    """Ask the model that was written."""
    model, vocabulary, answers = LM2ForCausalLM.load(folder).eval(), TASK.vocabulary, []
    for example in examples:
        (question,) = example.questions
        # the rest is for the answer
        prompt = TASK.collate([example])["input_ids"][:, : -question.hops]
        generated = model.generate(prompt, max_new_tokens=question.hops).sequences
        answers.append(
            Answer(
                ", ".join(" ".join(sentence) for sentence in example.sentences),
                f"where is {question.subject}?",
                vocabulary.decode(generated[0, -question.hops :].tolist()),
                " ".join(question.answer),
                vocabulary.decode(prompt[0].tolist()),
            )
        )
    return answers


def _plot(outcomes: Sequence[Outcome], path: Path, window: int = 20) -> list[Path]:
    with figures.style():
        figure = figures.new_figure((7.0, 4.0), "Loss on stories with and without memory")
        axes = figure.subplots()
        for outcome, colour in zip(outcomes, figures.COLOURS, strict=False):
            means = [
                statistics.fmean(outcome.losses[max(0, end - window) : end])
                for end in range(1, len(outcome.losses) + 1)
            ]
            axes.plot(range(1, len(means) + 1), means, label=outcome.name, color=colour)
        axes.set(xlabel="step", ylabel=f"loss, mean of {window} steps", ylim=(0.0, None))
        axes.legend()
        return figures.save(figure, path)


@torch.no_grad()
def _plot_reads(model: LM2ForCausalLM, example: Example, answer: Answer, path: Path) -> list[Path]:
    """How the words of a question read the slots, each of which a sentence has written.

    A segment's sentences have three words, and its slots three tokens each.
    """
    (question,), model = example.questions, model.eval()
    ids = TASK.collate([example])["input_ids"].to(next(model.parameters()).device)
    # what the model said in its answer's place; the last word is read by nobody
    said = answer.answer.split()[:-1]
    ids[0, -1 - len(said) : -1] = torch.tensor(TASK.vocabulary.encode(" ".join(said)))
    with telemetry.watch(model) as record:
        model(ids)
    words = ["where", question.subject, *said]
    sentences = [" ".join(sentence) for sentence in example.sentences]
    slots = sentences + ["(nothing)"] * (SLOTS - len(sentences))
    title = f"where is {question.subject}? {answer.answer}"
    foot = ["Columns: slots, by the sentences that wrote them. Rows: words of the question and of "]
    foot[0] += "the answer. Colours: how much of its reading each gives to a slot."
    with figures.style():
        reads = record.reads()
        figure = figures.new_figure((7.0, 1.6 + 1.1 * len(reads)), title, foot)
        grid = figure.subplots(len(reads), 1, sharex=True)
        for number, (axes, weights) in enumerate(zip(grid, reads.values(), strict=True)):
            rows = weights[-1 - len(words) : -1]
            texts = [[f"{weight:.2f}" for weight in row] for row in rows.tolist()]
            figures.draw_heat(axes, rows.tolist(), texts=texts)
            axes.set_title(f"block {number}")
            axes.set_yticks(range(len(words)), words)
            axes.set_xticks(range(len(slots)), slots, rotation=30, ha="right")
            axes.tick_params(length=0)
        return figures.save(figure, path)


def _write_report(
    path: Path,
    outcomes: Sequence[Outcome],
    baselines: dict[str, dict[int, Accuracy]],
    seed: int,
) -> None:
    def shares(by_hops: dict[int, Accuracy]) -> dict[str, float]:
        return {f"{hops} hops": accuracy.share for hops, accuracy in by_hops.items()}

    content = {
        "seed": seed,
        "steps": len(outcomes[0].losses),
        "validation": outcomes[0].accuracy[1].total,
        "task": dataclasses.asdict(TASK),
        "models": [
            {**dataclasses.asdict(outcome), "accuracy": shares(outcome.accuracy)}
            for outcome in outcomes
        ],
        "baselines": {name: shares(by_hops) for name, by_hops in baselines.items()},
    }
    write_json(path, content, _KEYS)


def _shares(by_hops: dict[int, Accuracy]) -> list[str]:
    return [f"{100 * by_hops[hops].share:.1f} %" for hops in (1, 2)]


def _filled(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """All rows as long as the longest."""
    width = max(map(len, rows))
    return [[*row, *[""] * (width - len(row))] for row in rows]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The released way and this package's on the same weights, inputs and machine."""

    size: int  # T = N = D
    difference: float  # largest, of outputs, new memory and gradients, in float64
    forward: float  # how many times as fast this package's is: median of paired rounds
    training: float  # forward and backward, likewise


def compare_with_released(
    sizes: Sequence[int] = (256, 512),
    *,
    batch: int = 1,
    num_heads: int = 8,
    rounds: int = 9,
    device: torch.device | str | None = None,
) -> list[Comparison]:
    """Swap our layer into a model of the released style: are the results equal, which is faster?

    Args:
        sizes: of T = N = D, where the released code runs.
        batch: B.
        num_heads: H.
        rounds: of timing. Each times both, in turns first, and their ratio's median counts.
        device: where; a GPU if there is one.
    """
    device = device or best_device()
    rows = []
    for size in sizes:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(size)
            released = nn.ModuleDict({"memory_module": ReleasedStyleMemory(size, num_heads)})
            x = torch.randn(batch, size, size, device=device)
        released.to(device)
        swapped = copy.deepcopy(released)
        swap_memory(swapped)
        layers = (swapped["memory_module"], released["memory_module"])
        inputs = (x, initial_memory(batch, size, size, device=device))
        forward, training = (_speed_ratio(layers, inputs, rounds, grad) for grad in (False, True))
        # last, as it makes them float64
        difference = _difference(layers, inputs)
        rows.append(Comparison(size, difference, forward, training))
    return rows


def render_comparison(rows: Sequence[Comparison]) -> str:
    """The text that the command prints."""
    table = [["tokens = slots = width", "largest difference", "forward", "with backward"]]
    for row in rows:
        speeds = (f"{ratio:.2f} x as fast" for ratio in (row.forward, row.training))
        table.append([str(row.size), f"{row.difference:.0e}", *speeds])
    lines = ["a memory layer computed the released way, and after lm2.swap_memory:"]
    lines += [f"  {line}" for line in columns(table)]
    lines.append("(differences in float64, of results and gradients; times in float32)")
    return "\n".join(lines)


def _difference(layers: tuple[nn.Module, nn.Module], inputs: tuple[Tensor, Tensor]) -> float:
    results = []
    for layer in layers:
        x, memory = (tensor.double().requires_grad_() for tensor in inputs)
        output, new_memory = layer.double()(x, memory)
        parameters = dict(layer.named_parameters())
        loss = output.sin().sum() + new_memory.cos().sum()
        gradients = torch.autograd.grad(loss, [x, memory, *parameters.values()])
        named = dict(zip(("x", "memory", *parameters), gradients, strict=True))
        results.append({"output": output, "new_memory": new_memory, **named})
    ours, theirs = results
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def _speed_ratio(
    layers: tuple[nn.Module, nn.Module], inputs: tuple[Tensor, Tensor], rounds: int, grad: bool
) -> float:
    """The second layer's time by the first's: the median over rounds."""

    def row(layer: nn.Module) -> Row:
        leaves = [tensor.detach().requires_grad_(grad) for tensor in inputs]
        return Row(lambda: layer(*leaves), [*leaves, *layer.parameters()])

    ours, released = map(row, layers)
    times = measure.measure(
        {"ours": ours, "released": released},
        "both" if grad else "forward",
        inputs,  # cotangents of the outputs' shapes
        inputs[0].device.type,
        budget=0.0,
        fewest=rounds,
    )
    return measure.ratio(times["released"], times["ours"])
