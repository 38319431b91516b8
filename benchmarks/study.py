"""The study: does the memory remember, and which one? Small models, many seeds, on CPUs.

    python benchmarks/study.py run --workers 2 --minutes 60     # goes on where it stopped
    python benchmarks/study.py run --blocks learning
    python benchmarks/study.py list

A *cell* is one model, trained and tested: its block, task, contender, learning rate and seed. Each
takes a minute or so in one thread. Results are lines of ``benchmarks/results/study/BLOCK.jsonl``,
each with its cell, so a run that was cut goes on with the cells that are not there yet.

Every contender of a block has the same decoder, data, batches and steps, and its parameters are
brought within 2 % of one another by the width of the MLP. Its learning rate is chosen by pilot
seeds among the same rates, widened for whom the best is at the edge; what is claimed comes from
other seeds.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import lm2_kernels as lm2
from lm2_kernels import reference
from lm2_kernels.evaluation import QATask, answer_accuracy
from lm2_kernels.evaluation.baselines import (
    RecurrentMemoryTransformer,
    ShuffledMemory,
    full_attention,
    num_parameters,
    widened,
    without_memory,
)
from lm2_kernels.training import train
from lm2_kernels.training.loop import Batch

FOLDER = Path(__file__).parent / "results" / "study"
SEEDS, PILOTS = range(5), (100, 101)
RATES = (1e-3, 2e-3, 4e-3)
# beyond an edge, at most so far
LOWEST, HIGHEST = 2.5e-4, 1.6e-2
BATCH, QUESTIONS, TESTED = 32, 4, 500
_TEST_SEED = 1_000_003
# what a run has that has left the plateau of guessing among the places of a story
ESCAPED = 0.5


@dataclasses.dataclass(frozen=True)
class Contender:
    """A model of a block.

    Args:
        kind: "lm2", or a baseline: "none", "rmt", "full".
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
            return {"none": "no memory", "full": "attention over everything"}[self.kind]
        name = f"{self.formulation}, {self.flow}, {self.write}, {self.slots} slots, "
        return name + self.candidate + ("" if self.start == "plain" else f", {self.start}")


@dataclasses.dataclass(frozen=True)
class Stories:
    """A block's task: questions about stories of so many segments of facts.

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
        """Training batches, the same for all contenders."""
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

    def tests(self) -> dict[str, tuple[int, float, int]]:
        """Segments, noise and hops of each test by its name."""
        kinds = itertools.product(self.tested, self.noises, (1, 2))
        return {f"{h} hops, {s} segments, noise {n:g}": (s, n, h) for s, n, h in kinds}

    def questions(self, segments: int, noise: float, hops: int) -> list[Batch]:
        """A test's questions, the same for all seeds."""
        task = self.task(segments, noise)
        source = task.examples(_TEST_SEED, hops=hops, validation=True)
        examples = list(itertools.islice(source, TESTED))
        return [task.collate(examples[i : i + 100]) for i in range(0, TESTED, 100)]


@dataclasses.dataclass(frozen=True)
class Block:
    """A table of the study: contenders on one task."""

    name: str
    task: Stories
    contenders: tuple[Contender, ...]
    steps: int = 900


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model to train and test."""

    block: str
    contender: Contender
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


BASELINES = (Contender("none"), Contender("rmt"), Contender("full"))


_POSITION = {"write": "position", "slots": 24}
BLOCKS = (
    # which runs leave the plateau: candidates, first weights, rules and flows on short stories
    Block(
        "learning",
        Stories(),
        (
            *BASELINES,
            *(
                Contender(candidate=candidate, start=start)
                for start in ("plain", "forget", "open")
                for candidate in ("token", "read")
            ),
            *(
                Contender(candidate=candidate, formulation=formulation, flow=flow, **_POSITION)
                for formulation in ("paper", "release")
                for flow in ("time", "depth")
                for candidate in ("token", "read")
            ),
            *(Contender(candidate=c, formulation="release") for c in ("token", "read")),
            Contender(candidate="read", start="open", **_POSITION),
        ),
    ),
    # slots that query the tokens, which is in the reference alone
    Block(
        "query",
        Stories(segments=(1, 2), noises=(0.2, 1.0), tested=(1, 2, 4, 8, 16), growing=True),
        (Contender(write="query"), Contender(write="query gates")),
        steps=1500,
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
            Contender(formulation="release"),
            Contender(flow="depth", **_POSITION),
        ),
        steps=1500,
    ),
)


# --- models ------------------------------------------------------------------------------------


def configuration(contender: Contender, task: Stories) -> lm2.LM2Config:
    """The model with memory; baselines are made from it."""
    return lm2.LM2Config(
        vocab_size=task.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        rope_theta=10.0,
        memory_slots=contender.slots,
        segment_length=task.segment_length,
        memory_heads=4,
        formulation=contender.formulation,
        flow=contender.flow,
        write=contender.write,
        candidate=contender.candidate,
        memory_init="learned",
        initializer_range=0.125,
    )


def build(contender: Contender, task: Stories, seed: int) -> nn.Module:
    """A contender with its first weights."""
    # the paper's memory in its usual form says how many parameters all have
    count = num_parameters(lm2.LM2ForCausalLM(configuration(Contender(), task)))
    torch.manual_seed(seed)
    if contender.kind == "lm2" and contender.write.startswith("query"):
        chunk = dataclasses.replace(contender, write="chunk")
        config, extra = configuration(chunk, task), 0
        for _ in config.memory_layers:
            extra += num_parameters(SlotQueryMemory(config, "")) - num_parameters(
                lm2.PaperMemory(config.hidden_size, candidate=config.candidate)
            )
        model = lm2.LM2ForCausalLM(widened(config, count - extra))
        for block in model.model.layers:
            block.memory = SlotQueryMemory(config, contender.write)
        return model
    if contender.kind == "lm2":
        model = lm2.LM2ForCausalLM(widened(configuration(contender, task), count))
        _start(model, contender.start)
        return model
    config = without_memory(configuration(Contender(), task))
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
    """Train and test one model, in one thread."""
    torch.set_num_threads(1)
    block, begun = block_named(cell.block), time.monotonic()
    task = block.task
    model = build(cell.contender, task, cell.seed)
    batches = list(task.batches(cell.seed, block.steps))
    torch.manual_seed(cell.seed)
    trained = time.monotonic()
    failure = None
    try:
        losses = train(
            model, batches, steps=block.steps, lr=cell.rate, warmup=30, floor=0.3, clip=1.0
        )
    except FloatingPointError as error:
        losses, failure = [], str(error)
    seconds = time.monotonic() - trained
    answers = {}
    for name, kind in task.tests().items():
        asked = task.questions(*kind)
        answers[name] = _counted(model, asked)
        if cell.contender.kind == "lm2" and kind[0] in task.segments:
            answers[f"{name}, shuffled"] = _counted(ShuffledMemory(model), asked)
    means = [statistics.fmean(losses[i : i + 100]) for i in range(0, len(losses), 100)]
    return {
        "cell": dataclasses.asdict(cell),
        "parameters": num_parameters(model),
        "steps": block.steps,
        "losses": [round(mean, 4) for mean in means],
        "failure": failure,
        "answers": answers,
        "train_seconds": round(seconds, 1),
        "minutes": round((time.monotonic() - begun) / 60.0, 2),
    }


def _counted(model: nn.Module, asked: list[Batch]) -> list[int]:
    accuracy = answer_accuracy(model, asked)
    return [accuracy.right, accuracy.total]


def score(result: dict) -> float:
    """What rates are chosen by: the mean share of right answers at the lengths trained on."""
    block = block_named(result["cell"]["block"])
    tests = block.task.tests().items()
    names = [name for name, (segments, _, _) in tests if segments in block.task.segments]
    return statistics.fmean(right / total for right, total in map(result["answers"].get, names))


def load(name: str) -> list[dict]:
    """A block's results."""
    path = FOLDER / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def cell_of(result: dict) -> Cell:
    """The cell of a line."""
    fields = dict(result["cell"])
    return Cell(**fields | {"contender": Contender(**fields["contender"])})


def rate_scores(block: Block, contender: Contender, results: dict[str, dict]) -> dict:
    """The pilots' mean score by rate, of rates whose pilots are all there."""
    scores = {}
    for rate in _ladder():
        cells = [Cell(block.name, contender, rate, seed) for seed in PILOTS]
        found = [results[cell.key] for cell in cells if cell.key in results]
        if len(found) == len(cells):
            scores[rate] = statistics.fmean(map(score, found))
    return scores


def _ladder() -> list[float]:
    rates = [RATES[0]]
    while rates[0] > LOWEST:
        rates.insert(0, rates[0] / 2.0)
    while rates[-1] < HIGHEST:
        rates.append(rates[-1] * 2.0)
    return rates


def chosen_rate(
    block: Block, contender: Contender, results: dict[str, dict]
) -> tuple[float | None, list[float]]:
    """The rate that the pilots chose, or None and the rates whose pilots are still to run."""
    scores, ladder = rate_scores(block, contender, results), _ladder()
    missing = [rate for rate in RATES if rate not in scores]
    if missing:
        return None, missing
    # of equal ones the lowest
    best = max(scores, key=lambda rate: (scores[rate], -rate))
    place = ladder.index(best)
    beyond = [ladder[i] for i in (place - 1, place + 1) if 0 <= i < len(ladder)]
    edge = [rate for rate in beyond if rate not in scores]
    # who has answered everything has no better rate
    return (None, edge) if edge and scores[best] < 0.995 else (best, [])


def plan(blocks: list[Block], results: dict[str, dict]) -> Iterator[Cell]:
    """The cells that can be run now, the most telling first."""
    for block in blocks:
        for contender in block.contenders:
            _, missing = chosen_rate(block, contender, results)
            yield from (Cell(block.name, contender, r, s) for s in PILOTS for r in missing)
        for seed in SEEDS:
            for contender in block.contenders:
                rate, _ = chosen_rate(block, contender, results)
                if rate is not None:
                    yield Cell(block.name, contender, rate, seed)


def run(blocks: list[Block], workers: int, minutes: float) -> None:
    """Run what is not there yet, and write each result as it comes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    where, until = machine(), time.monotonic() + 60.0 * minutes
    results = {cell_of(r).key: r for block in blocks for r in load(block.name)}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        running: dict[concurrent.futures.Future, Cell] = {}
        while True:
            taken = {cell.key for cell in running.values()}
            ready = (c for c in plan(blocks, results) if c.key not in results.keys() | taken)
            if time.monotonic() < until:
                for cell in itertools.islice(ready, workers - len(running)):
                    running[pool.submit(run_cell, cell)] = cell
            if not running:
                break
            done, _ = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                cell = running.pop(future)
                result = future.result() | {"machine": where}
                results[cell.key] = result
                with (FOLDER / f"{cell.block}.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                print(_line(cell, result), flush=True)


def _line(cell: Cell, result: dict) -> str:
    shares = " ".join(f"{100 * r / n:.0f}" for r, n in result["answers"].values())
    name = f"{cell.block}: {cell.contender.name}, rate {cell.rate:g}, seed {cell.seed}"
    return f"{name}: {shares} % ({result['minutes']:.1f} min)"


def machine() -> dict:
    """What the results come from."""
    folder = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "lm2_kernels": lm2.__version__,
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "list"))
    parser.add_argument("--blocks", nargs="*", default=[block.name for block in BLOCKS])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after them")
    options = parser.parse_args()
    blocks = [block_named(name) for name in options.blocks]
    if options.what == "run":
        run(blocks, options.workers, options.minutes)
        return
    for block in blocks:
        results = load(block.name)
        cells = len(block.contenders) * (len(SEEDS) + len(PILOTS) * len(RATES))
        print(f"{block.name}: {len(results)} of at least {cells} cells")


if __name__ == "__main__":
    main()
