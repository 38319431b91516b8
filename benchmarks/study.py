"""The study: does the memory remember, and which one? Small models, many seeds, on CPUs.

    python benchmarks/study.py run --workers 2 --minutes 60     # goes on where it stopped
    python benchmarks/study.py run --blocks learning
    LM2_STUDY_TEXT=book.txt python benchmarks/study.py run --blocks text
    python benchmarks/study.py list
    python benchmarks/study.py costs                            # on a machine that is idle

A *cell* is one model, trained and tested: its block, contender, learning rate, base and seed. Each
takes half a minute to some minutes in one thread. Results are lines of
``benchmarks/results/study/BLOCK.jsonl``, each with its cell, so a run that was cut goes on with the
cells that are not there yet. A line of another protocol (other steps, questions or data than its
block has now) counts for nothing.

Every contender of a block has the same decoder, data, batches and steps, and its parameters are
brought within 2 % of one another by the width of the MLP. Its learning rate and the base of its
rotary positions are chosen by pilots, from the same grid for all: one seed each, a second seed for
the two best, and rates beyond the grid for whom the best is at its edge. What is claimed comes from
other seeds, and from other questions than the pilots were asked.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

import lm2_kernels as lm2
from lm2_kernels import reference
from lm2_kernels.bench import measure
from lm2_kernels.bench.works import Row
from lm2_kernels.evaluation import QATask, answer_accuracy, tasks
from lm2_kernels.evaluation.baselines import (
    RecurrentMemoryTransformer,
    ShuffledMemory,
    full_attention,
    num_parameters,
    widened,
    without_memory,
)
from lm2_kernels.evaluation.layout import Layout, words
from lm2_kernels.evaluation.samples import Task
from lm2_kernels.training import mean_loss, train
from lm2_kernels.training.data import Bytes, Corpus
from lm2_kernels.training.loop import Batch

FOLDER = Path(__file__).parent / "results" / "study"
SEEDS, PILOTS = range(5), (100, 101)
RATES, THETAS = (1e-3, 2e-3, 4e-3), (10.0, 10000.0)
# beyond an edge, at most so far
LOWEST, HIGHEST = 2.5e-4, 1.6e-2
# who answers this share has no better rate
ALL = 0.995
BATCH, QUESTIONS, TESTED = 32, 4, 500
# of questions: of what is claimed, and of pilots
_TEST_SEED, _PILOT_SEED = 1_000_003, 2_000_003
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "memory_heads": 4,
    "initializer_range": 0.125,
}
_TRAINING = {"warmup": 30, "floor": 0.3, "clip": 1.0}
# raised by hand where cells come out otherwise for a reason that no option shows, as a task's words
_PROTOCOL = 1
# what a run has that has left the plateau of guessing among the places of a story
ESCAPED = 0.5


@dataclasses.dataclass(frozen=True)
class Contender:
    """A model of a block.

    Args:
        kind: "lm2", or a baseline: "none", "rmt", "full"; "narrow" is "none" with the MLPs of the
            usual memory's model, and so with fewer parameters than all others.
        formulation, flow, write, candidate, slots: of the memory; of "rmt", slots are its tokens.
            A write "query" is the experiment of ``reference.slot_query_memory``, which pools
            proposals, and "query gates" the one that pools what comes before the gates.
        start: of the weights: "plain", "open" (the query projection doubled, those of values and
            of the input gate four times, banks of normal numbers that differ little) or "forget"
            (the forget gate's bias is 1).
    """

    kind: str = "lm2"
    formulation: str = "paper"
    flow: str = "time"
    write: str = "chunk"
    candidate: str = "token"
    slots: int = 8
    start: str = "plain"

    @property
    def name(self) -> str:
        """By which tables know it."""
        if self.kind == "rmt":
            return f"RMT, {self.slots} tokens"
        if self.kind != "lm2":
            names = {"none": "no memory", "full": "attention over everything"}
            return (names | {"narrow": "no memory, the memory's MLPs"})[self.kind]
        name = f"{self.formulation}, {self.flow}, {self.write}, {self.slots} slots, "
        return name + self.candidate + ("" if self.start == "plain" else f", {self.start}")


class Asked(Protocol):
    """What a block's contenders are trained on and asked."""

    segment_length: int
    vocab_size: int
    longest: int  # tokens of the longest row

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        """Training batches, the same for all contenders."""

    def tests(self, seed: int) -> Iterator[tuple[str, bool, list[Batch]]]:
        """Names, whether of a size that is trained on, and the questions of a seed."""


@dataclasses.dataclass(frozen=True)
class Stories:
    """Questions about stories of so many segments of facts.

    Args:
        segments: of facts, in training; each step has one of these.
        noises: shares of noise, in training, likewise.
        tested: segments of facts in tests.
        loss: "answers", or "all" for the loss on all words that are read.
        growing: whether the first third of the steps has the fewest segments alone.
        options: of every :class:`QATask`.
    """

    segments: tuple[int, ...] = (1,)
    noises: tuple[float, ...] = (0.2,)
    tested: tuple[int, ...] = (1,)
    loss: str = "answers"
    growing: bool = False
    options: tuple[tuple[str, int], ...] = ()

    def task(self, segments: int, noise: float) -> QATask:
        return QATask(fact_segments=segments, noise=noise, **dict(self.options))

    @property
    def segment_length(self) -> int:
        return self.task(self.segments[-1], self.noises[0]).segment_length

    @property
    def vocab_size(self) -> int:
        return QATask().vocabulary.vocab_size

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return self.task(max(self.tested), self.noises[0]).length

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        kinds = list(itertools.product(self.segments, self.noises))
        sources = {
            kind: self.task(*kind).batches(BATCH, 1000 * seed + number, questions=QUESTIONS)
            for number, kind in enumerate(kinds)
        }
        few = [kind for kind in kinds if kind[0] == min(self.segments)]
        for step in range(steps):
            known = few if self.growing and step < steps // 3 else kinds
            batch = next(sources[known[step % len(known)]])
            if self.loss == "all":
                ids, labels = batch["input_ids"], batch["labels"]
                read = torch.where(ids == 0, -100, ids)
                batch = batch | {"labels": torch.where(labels == -100, read, labels)}
            yield batch

    def tests(self, seed: int) -> Iterator[tuple[str, bool, list[Batch]]]:
        for name, (segments, noise, hops) in self.kinds().items():
            task = self.task(segments, noise)
            source = task.examples(seed, hops=hops, validation=True)
            examples = list(itertools.islice(source, TESTED))
            parts = [examples[i : i + 100] for i in range(0, TESTED, 100)]
            yield name, segments in self.segments, [task.collate(part) for part in parts]

    def kinds(self) -> dict[str, tuple[int, float, int]]:
        """Segments, noise and hops of each test by its name."""
        kinds = itertools.product(self.tested, self.noises, (1, 2))
        return {f"{h} hops, {s} segments, noise {n:g}": (s, n, h) for s, n, h in kinds}


@dataclasses.dataclass(frozen=True)
class Told:
    """One of the package's tasks in words: facts in background text, and a question behind it.

    The context fills its segments, the question stands in one of its own.

    Args:
        name: of the task (``lm2_kernels.evaluation.task``).
        segments: of the context, in training; each step has one of these.
        tested: segments of the context in tests.
        rows: of a batch.
    """

    name: str
    segments: tuple[int, ...] = (1, 2)
    tested: tuple[int, ...] = (1, 2, 4, 8)
    rows: int = 16
    segment_length: int = 64

    @functools.cached_property
    def layout(self) -> Layout:
        return Layout(words(tasks.all_words()), self.segment_length)

    @property
    def vocab_size(self) -> int:
        return self.layout.tokenizer.vocab_size

    @property
    def longest(self) -> int:
        return (max(self.tested) + 1) * self.segment_length

    def _batch(self, source: Task, numbers: range, segments: int) -> Batch:
        length = segments * self.segment_length
        samples = [source.sample(number, length, self.layout.count) for number in numbers]
        return self.layout.collate(samples, segments)

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        source = tasks.task(self.name, seed=seed, validation=False)
        for step in range(steps):
            # the fewest segments alone for a third of the steps
            known = self.segments[:1] if step < steps // 3 else self.segments
            numbers = range(step * self.rows, (step + 1) * self.rows)
            yield self._batch(source, numbers, known[step % len(known)])

    def tests(self, seed: int) -> Iterator[tuple[str, bool, list[Batch]]]:
        source = tasks.task(self.name, seed=seed, validation=True)
        for name, (segments,) in self.kinds().items():
            parts = [range(i, min(i + 50, TESTED)) for i in range(0, TESTED, 50)]
            asked = [self._batch(source, numbers, segments) for numbers in parts]
            yield name, segments in self.segments, asked

    def kinds(self) -> dict[str, tuple[int]]:
        """Segments of each test by its name."""
        return {f"{segments} segments": (segments,) for segments in self.tested}


@dataclasses.dataclass(frozen=True)
class Text:
    """Text byte by byte: what it costs a language model to have a memory, or what it gains.

    The text is the file that ``LM2_STUDY_TEXT`` names; its last twentieth is held out.

    Args:
        segments: of a row.
        rows: of a batch.
    """

    segments: int = 4
    rows: int = 8
    segment_length: int = 64
    vocab_size: int = Bytes.vocab_size

    @property
    def longest(self) -> int:
        return self.segments * self.segment_length

    def _corpus(self) -> Corpus:
        return Corpus.open([Path(os.environ["LM2_STUDY_TEXT"])])

    def _parts(self) -> tuple[Corpus, Corpus]:
        return self._corpus().split(0.05, self.longest)

    def digest(self) -> str:
        """Of the text."""
        return self._corpus().digests()[0]

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        return itertools.islice(self._parts()[0].batches(self.rows, self.longest, seed), steps)

    def tests(self, seed: int) -> Iterator[tuple[str, bool, list[Batch]]]:
        # pilots are asked the first half, claims the second
        halves = self._parts()[1].split(0.5, self.longest)
        half = halves[0 if seed == _PILOT_SEED else 1]
        held_out = half.batches(self.rows, self.longest, seed)
        yield "held out", True, list(itertools.islice(held_out, TESTED // self.rows))


@dataclasses.dataclass(frozen=True)
class SpreadText(Text):
    """:class:`Text` of which the last twentieth of each of many pieces is held out.

    The end of a text may be unlike the rest: of the plays it is one with an indentation of its own.
    """

    pieces: int = 100

    def _corpus(self) -> Corpus:
        whole = super()._corpus()
        (text,) = whole.files
        return dataclasses.replace(whole, files=tuple(np.array_split(text, self.pieces)))

    def digest(self) -> str:
        """Of the whole text."""
        return super()._corpus().digests()[0]


@dataclasses.dataclass(frozen=True)
class Block:
    """A table of the study: contenders on one task."""

    name: str
    task: Asked
    contenders: tuple[Contender, ...]
    steps: int = 900
    measure: str = "answers"  # or "loss"
    tuned_by: str | None = None  # the block whose pilots choose for this one

    def protocol(self) -> str:
        """What makes two lines of the same cell comparable."""
        content = (_PROTOCOL, self.task, self.steps, self.measure, TESTED, BATCH, QUESTIONS)
        content += (_TEST_SEED, _PILOT_SEED, _SIZES, _TRAINING)
        return hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model to train and test."""

    block: str
    contender: Contender
    rate: float
    seed: int
    theta: float = 10.0

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


BASELINES = (Contender("none"), Contender("rmt"), Contender("full"))


_POSITION = {"write": "position", "slots": 24}
_QUERIES = (Contender(write="query"), Contender(write="query gates"))
BLOCKS = (
    # which runs leave the plateau: candidates, first weights, rules and flows on short stories
    Block(
        "learning",
        Stories(),
        (
            *BASELINES,
            Contender(),
            Contender(candidate="read"),
            Contender(candidate="read", start="open"),
            Contender(start="forget"),
            Contender(start="open"),
            Contender(**_POSITION),
            Contender(candidate="read", **_POSITION),
            Contender(candidate="read", start="open", **_POSITION),
            Contender(flow="depth", **_POSITION),
            Contender(flow="depth", candidate="read", **_POSITION),
            Contender(formulation="release"),
            Contender(formulation="release", candidate="read"),
            Contender(formulation="release", flow="depth", **_POSITION),
            Contender(formulation="release", flow="depth", candidate="read", **_POSITION),
            *_QUERIES,
        ),
    ),
    # four times the steps, for whom most seeds stay on the plateau
    Block(
        "patience",
        Stories(),
        (Contender("rmt"), Contender("full"), Contender(candidate="read")),
        steps=3600,
        tuned_by="learning",
    ),
    # longer stories, facts among noise, and many times as many segments as were trained on
    Block(
        "length",
        Stories(segments=(1, 2), noises=(0.2, 1.0), tested=(1, 2, 4, 8, 16), growing=True),
        (
            *BASELINES,
            Contender(),
            Contender(candidate="read"),
            Contender(start="forget"),
            Contender(**_POSITION),
            Contender(flow="depth", **_POSITION),
            Contender(formulation="release"),
            *_QUERIES,
        ),
        steps=1500,
        tuned_by="learning",
    ),
    # the loss on all that is read, not on answers alone
    Block(
        "all_words",
        Stories(loss="all"),
        (*BASELINES, Contender(), Contender(candidate="read")),
    ),
    # long stories from the first step on
    Block(
        "no_curriculum",
        Stories(segments=(1, 2), noises=(0.2, 1.0), tested=(1, 2, 4, 8, 16)),
        (Contender(), Contender(**_POSITION)),
        steps=1500,
        tuned_by="learning",
    ),
    # how many slots six sentences in 24 tokens need
    Block(
        "slots",
        Stories(),
        (
            *(Contender(slots=slots) for slots in (2, 4, 12, 24)),
            *(Contender("rmt", slots=slots) for slots in (2, 16)),
        ),
        tuned_by="learning",
    ),
    # and twenty in 64 tokens, most of which say nothing
    Block(
        "slots_64",
        Stories(
            noises=(0.8,),
            options=(("segment_length", 64), ("sentences", 20)),
        ),
        (
            *(Contender(slots=slots) for slots in (4, 16, 64)),
            Contender(write="position", slots=64),
            *(Contender("rmt", slots=slots) for slots in (4, 16)),
            Contender("full"),
        ),
        steps=2400,
        tuned_by="learning",
    ),
    # the tasks that others know, in few words
    *(
        Block(
            name,
            Told(name, segments, tested),
            (
                *(Contender(kind, slots=16) for kind in ("none", "rmt", "full")),
                Contender(slots=16),
                Contender(slots=64, write="position"),
            ),
            steps=1500,
            tuned_by="learning",
        )
        for name, segments, tested in (
            ("qa1", (1, 2), (1, 2, 4, 8)),
            ("mqar", (1, 2), (1, 2, 4, 8)),
            ("niah", (1, 2), (1, 2, 4, 8)),
            ("qa4", (1, 2), (1, 2, 4, 8)),
            ("qa5", (2, 4), (2, 4, 8)),
            ("qa2", (2, 4), (2, 4, 8)),
            ("qa3", (4, 8), (4, 8, 16)),
        )
    ),
    # no harm: the loss on held-out text
    Block(
        "text",
        Text(),
        (
            *(Contender(kind, slots=16) for kind in ("none", "rmt", "full")),
            Contender(slots=16),
            Contender(slots=16, candidate="read"),
            Contender(slots=16, formulation="release"),
            Contender(slots=64, write="position"),
        ),
        steps=1000,
        measure="loss",
    ),
)
BLOCKS += (
    dataclasses.replace(
        BLOCKS[-1],
        name="text_spread",
        task=SpreadText(),
        contenders=(*BLOCKS[-1].contenders, Contender("narrow", slots=16)),
        tuned_by="text",
    ),
)


# --- models ------------------------------------------------------------------------------------


def configuration(contender: Contender, task: Asked, theta: float = 10.0) -> lm2.LM2Config:
    """The model with memory; baselines are made from it."""
    return lm2.LM2Config(
        vocab_size=task.vocab_size,
        rope_theta=theta,
        memory_slots=contender.slots,
        segment_length=task.segment_length,
        formulation=contender.formulation,
        flow=contender.flow,
        write=contender.write,
        candidate=contender.candidate,
        memory_init="learned",
        **_SIZES,
    )


def build(contender: Contender, task: Asked, seed: int, theta: float = 10.0) -> nn.Module:
    """A contender with its first weights."""
    # the paper's memory in its usual form says how many parameters all have
    count = num_parameters(lm2.LM2ForCausalLM(configuration(Contender(), task)))
    torch.manual_seed(seed)
    if contender.kind == "lm2" and contender.write.startswith("query"):
        chunk = dataclasses.replace(contender, write="chunk")
        config = configuration(chunk, task, theta)
        with torch.device("meta"):
            ours = lm2.PaperMemory(config.hidden_size, candidate=config.candidate)
            extra = num_parameters(SlotQueryMemory(config, "")) - num_parameters(ours)
        model = lm2.LM2ForCausalLM(widened(config, count - extra * len(config.memory_layers)))
        for block in model.model.layers:
            block.memory = SlotQueryMemory(config, contender.write)
        return model
    if contender.kind == "lm2":
        model = lm2.LM2ForCausalLM(widened(configuration(contender, task, theta), count))
        _start(model, contender.start)
        return model
    config = configuration(Contender(), task, theta)
    if contender.kind == "narrow":
        return lm2.LM2ForCausalLM(without_memory(widened(config, count)))
    config = without_memory(config)
    if contender.kind == "rmt":
        return RecurrentMemoryTransformer(widened(config, count), contender.slots)
    if contender.kind == "full":
        config = full_attention(config, task.longest)
    return lm2.LM2ForCausalLM(widened(config, count))


class SlotQueryMemory(lm2.PaperMemory):
    """``reference.slot_query_memory`` in the place of a layer; of whole segments alone."""

    def __init__(self, config: lm2.LM2Config, write: str):
        super().__init__(
            config.hidden_size,
            config.memory_heads,
            write="chunk",
            tokens_per_slot=config.tokens_per_slot,
            candidate=config.candidate,
        )
        dim, std = config.hidden_size, config.initializer_range
        self.slot_query_proj = nn.Linear(dim, dim, bias=False)
        self.token_key_proj = nn.Linear(dim, dim, bias=False)
        for layer in self.children():
            nn.init.normal_(layer.weight, std=std)
        self.slot_embedding = nn.Parameter(torch.zeros(config.memory_slots, dim))
        self.locality = nn.Parameter(torch.full((config.memory_heads,), 2.0))
        self.pool = "gates" if write == "query gates" else "proposals"

    def forward(self, x, memory, *, cache=None):
        assert cache is None or not cache.is_open
        parameters = dict(self.named_parameters())
        return reference.slot_query_memory(
            x, memory, parameters, num_heads=self.num_heads, pool=self.pool
        )


@torch.no_grad()
def _start(model: lm2.LM2ForCausalLM, start: str) -> None:
    for layer in model.memory_layers():
        if start == "open":
            layer.query_proj.weight.mul_(2.0)
            layer.value_proj.weight.mul_(4.0)
            layer.input_gate_proj.weight.mul_(4.0)
        if start == "forget":
            old = layer.forget_gate_proj
            layer.forget_gate_proj = nn.Linear(layer.dim, layer.dim)
            layer.forget_gate_proj.weight.copy_(old.weight)
            layer.forget_gate_proj.bias.fill_(1.0)
    if start == "open":
        banks = model.initial_memory
        banks.copy_(torch.randn_like(banks[:, :1]) + 0.1 * torch.randn_like(banks))


# --- cells -------------------------------------------------------------------------------------


def block_named(name: str) -> Block:
    return next(block for block in BLOCKS if block.name == name)


def run_cell(cell: Cell) -> dict:
    """Train and test one model."""
    block, begun = block_named(cell.block), time.monotonic()
    task = block.task
    model = build(cell.contender, task, cell.seed, cell.theta)
    batches = list(task.batches(cell.seed, block.steps))
    torch.manual_seed(cell.seed)
    trained = time.process_time()
    failure = None
    try:
        losses = train(model, batches, steps=block.steps, lr=cell.rate, **_TRAINING)
    except FloatingPointError as error:
        losses, failure = [], str(error)
    seconds = time.process_time() - trained
    measured, count = {}, mean_loss if block.measure == "loss" else _answered
    for name, is_trained, asked in task.tests(_PILOT_SEED if cell.seed in PILOTS else _TEST_SEED):
        measured[name] = count(model, asked)
        if cell.contender.kind == "lm2" and is_trained:
            measured[f"{name}, shuffled"] = count(ShuffledMemory(model), asked)
    means = [statistics.fmean(losses[i : i + 100]) for i in range(0, len(losses), 100)]
    return {
        "cell": dataclasses.asdict(cell),
        "parameters": num_parameters(model),
        "steps": block.steps,
        "losses": [round(mean, 4) for mean in means],
        "failure": failure,
        block.measure: measured,
        **({"text": task.digest()} if isinstance(task, Text) else {}),
        "train_cpu_seconds": round(seconds, 1),
        "protocol": block.protocol(),
        "minutes": round((time.monotonic() - begun) / 60.0, 2),
    }


def _answered(model: nn.Module, asked: list[Batch]) -> list[int]:
    accuracy = answer_accuracy(model, asked)
    return [accuracy.right, accuracy.total]


def score(result: dict) -> float:
    """What pilots are compared by: right answers of 1 at the lengths trained on, or less loss."""
    block = block_named(result["cell"]["block"])
    if block.measure == "loss":
        return -result["loss"]["held out"] if result["failure"] is None else -math.inf
    kinds = block.task.kinds().items()
    names = [name for name, (segments, *_) in kinds if segments in block.task.segments]
    return statistics.fmean(right / total for right, total in map(result["answers"].get, names))


def load(name: str) -> list[dict]:
    """A block's results by its protocol; a last line that a kill cut is left out."""
    path, protocol = FOLDER / f"{name}.jsonl", block_named(name).protocol()
    if not path.exists():
        return []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    results = [json.loads(line) for line in lines if line.endswith("\n")]
    return [result for result in results if result.get("protocol") == protocol]


def _append(name: str, result: dict) -> None:
    path = FOLDER / f"{name}.jsonl"
    there = path.read_bytes() if path.exists() else b""
    whole = there[: there.rfind(b"\n") + 1]
    if whole != there:
        path.write_bytes(whole)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def cell_of(result: dict) -> Cell:
    """The cell of a line."""
    fields = dict(result["cell"])
    return Cell(**fields | {"contender": Contender(**fields["contender"])})


def tuned(
    block: Block, contender: Contender, results: dict[str, dict]
) -> tuple[tuple[float, float] | None, list[Cell]]:
    """The rate and base that the pilots chose, or None and the pilots that are still to run."""
    if block.tuned_by is not None:
        other = block_named(block.tuned_by)
        if contender.kind == "narrow":
            contender = dataclasses.replace(contender, kind="none")
        # the same, but for its slots
        like = next(
            each
            for each in other.contenders
            if dataclasses.replace(each, slots=contender.slots) == contender
        )
        return tuned(other, like, results)
    if contender.kind == "none" and block.measure == "answers":
        # it cannot know: any will do
        return (RATES[0], THETAS[0]), []

    def pilot(place: tuple[float, float], seed: int) -> Cell:
        return Cell(block.name, contender, place[0], seed, place[1])

    def mean(place: tuple[float, float]) -> float:
        return statistics.fmean(score(results[pilot(place, seed).key]) for seed in PILOTS)

    tried = list(itertools.product(RATES, THETAS))
    while True:
        first = [pilot(place, PILOTS[0]) for place in tried]
        missing = [cell for cell in first if cell.key not in results]
        if missing:
            return None, missing
        # of equal ones the lowest rate
        ranked = sorted(tried, key=lambda p: (-score(results[pilot(p, PILOTS[0]).key]), p))
        second = [pilot(place, PILOTS[1]) for place in ranked[:2]]
        missing = [cell for cell in second if cell.key not in results]
        if missing:
            return None, missing
        best = min(ranked[:2], key=lambda place: (-mean(place), place))
        beyond = [(best[0] * factor, best[1]) for factor in (0.5, 2.0)]
        beyond = [p for p in beyond if p not in tried and LOWEST <= p[0] <= HIGHEST]
        if not beyond or mean(best) >= ALL:
            return best, []
        tried += beyond


def plan(blocks: list[Block], results: dict[str, dict]) -> Iterator[Cell]:
    """The cells that can be run now, the most telling first."""
    for block in blocks:
        for contender in block.contenders:
            yield from tuned(block, contender, results)[1]
        for seed in SEEDS:
            for contender in block.contenders:
                place, _ = tuned(block, contender, results)
                if place is not None:
                    yield Cell(block.name, contender, place[0], seed, place[1])


def run(blocks: list[Block], workers: int, minutes: float) -> None:
    """Run what is not there yet, and write each result as it comes.

    A cell that fails ends the run when what runs beside it is written.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    if "LM2_STUDY_TEXT" not in os.environ and any(isinstance(b.task, Text) for b in blocks):
        print("left out: the block text, as LM2_STUDY_TEXT names no file")
        blocks = [block for block in blocks if not isinstance(block.task, Text)]
    for block in blocks:
        if isinstance(block.task, Text):
            others = {result["text"] for result in load(block.name)} - {block.task.digest()}
            if others:
                raise SystemExit(f"the lines of the block {block.name} are of another text")
    where, until = machine(), time.monotonic() + 60.0 * minutes
    results = {cell_of(r).key: r for block in BLOCKS for r in load(block.name)}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        running: dict[concurrent.futures.Future, Cell] = {}
        failed: BaseException | None = None
        while True:
            taken = {cell.key for cell in running.values()}
            ready = (c for c in plan(blocks, results) if c.key not in results.keys() | taken)
            if time.monotonic() < until and failed is None:
                for cell in itertools.islice(ready, workers - len(running)):
                    running[pool.submit(run_cell, cell)] = cell
            if not running:
                break
            done, _ = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                cell = running.pop(future)
                if future.exception() is not None:
                    failed = future.exception()
                    continue
                result = future.result() | {"machine": where}
                results[cell.key] = result
                _append(cell.block, result)
                print(_line(cell, result), flush=True)
        if failed is not None:
            raise failed


def _line(cell: Cell, result: dict) -> str:
    if "loss" in result:
        found = " ".join(f"{loss:.4f}" for loss in result["loss"].values())
    else:
        found = " ".join(f"{100 * r / n:.0f}" for r, n in result["answers"].values()) + " %"
    place = f"rate {cell.rate:g}, base {cell.theta:g}, seed {cell.seed}"
    name = f"{cell.block}: {cell.contender.name}, {place}"
    return f"{name}: {found} ({result['minutes']:.1f} min)"


def costs() -> dict:
    """What a step of training costs each contender of the longest block: in turns, in one thread.

    Milliseconds of forward and backward pass (the median of 15 rounds), the median ratio to the
    decoder without a memory, and what is kept for backward.
    """
    block = block_named("length")
    stories = block.task.task(block.task.segments[-1], block.task.noises[0])
    batch = next(stories.batches(BATCH, 0, questions=QUESTIONS))
    rows, counts = {}, {}
    for contender in block.contenders:
        model = build(contender, block.task, 0)
        parameters = list(model.parameters())
        counts[contender.name] = num_parameters(model)
        rows[contender.name] = Row(lambda model=model: (model(**batch).loss,), parameters)
    plain = Contender("none").name
    times = measure.measure(rows, "both", (torch.ones(()),), "cpu", budget=0.0, fewest=15)
    return {
        "batch": list(batch["input_ids"].shape),
        "machine": machine(),
        "contenders": {
            name: {
                "parameters": counts[name],
                "milliseconds": round(1e3 * statistics.median(times[name]), 2),
                "ratio": round(measure.ratio(times[name], times[plain]), 3),
                "kept_bytes": measure.saved_bytes(row),
            }
            for name, row in rows.items()
        },
    }


def machine() -> dict:
    """What the results come from."""
    # but for the results themselves
    changed = ("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results")
    return {
        "command": " ".join(sys.argv),
        "lm2_kernels": lm2.__version__,
        "commit": _git("rev-parse", "--short", "HEAD") + ("-dirty" if _git(*changed) else ""),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "list", "costs"))
    names = [block.name for block in BLOCKS]
    parser.add_argument("--blocks", nargs="+", choices=names, default=names)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after them")
    options = parser.parse_args()
    blocks = [block_named(name) for name in options.blocks]
    if options.what == "run":
        run(blocks, options.workers, options.minutes)
        return
    if options.what == "costs":
        FOLDER.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        (FOLDER / "costs.json").write_text(json.dumps(costs(), indent=1) + "\n")
        return
    results = {cell_of(r).key: r for block in BLOCKS for r in load(block.name)}
    for block in blocks:
        print(f"{block.name}: {len(load(block.name))} cells")
        for contender in block.contenders:
            place, pilots = tuned(block, contender, results)
            to_do = f"{len(pilots)} pilots at least" if place is None else "tuned to {:g}, {:g}"
            print(f"  {contender.name}: {to_do.format(*(place or ()))}")


if __name__ == "__main__":
    main()
