"""A pretrained model is given a memory: what does it recall that its window no longer shows?

    python benchmarks/real_model.py --model FOLDER [--gguf FILE] --seeds 0 1 2 --minutes 30
    python benchmarks/real_model.py --model FOLDER ... --candidate read --first 110 --out FILE

The model reads a context by windows of 32 tokens, each from its first position, and then the
question, and how its answer begins, in a window of its own: of the context it has nothing but what
the memory carries. The model is frozen; only the memory is trained, with the loss on the answer's
first token, which tells all answers of a task apart. Steps and data are the same for every seed.

A *cell* is a seed, or "plain", the model as it came: given the last window alone, which is also
what the memory answers before training, as its logits are then the same bit for bit; and given
everything in one window. Of a trained memory, the answers are counted with it and with that of
another row, given to it before the question.

Each cell is a line of --out. What a cell has done is kept in a folder beside it, and after so many
minutes (or a kill) the next call goes on from there, to the same result. Another model, another
--dtype, --candidate, --rate or --first, or what another version of this script asks, takes another
--out.

With --first a cell is the first so many steps of the training, of which the losses are kept.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import lm2_kernels as lm2
from lm2_kernels import machine
from lm2_kernels.disk import replace_file
from lm2_kernels.evaluation import Sample, task
from lm2_kernels.evaluation.babilong import InBackground
from lm2_kernels.evaluation.samples import Story, distinct_words
from lm2_kernels.evaluation.tasks import Source
from lm2_kernels.model.output import LM2Output
from lm2_kernels.patching import Report
from lm2_kernels.patching.prints import fingerprint
from lm2_kernels.training import train
from lm2_kernels.training.loop import Batch, autocast_in

OUT = Path(__file__).parent / "results" / "study" / "real.jsonl"
# tokens of a window, which are as many slots
WINDOW = 32
BATCH, RATE, WARMUP = 16, 2e-3, 20
TESTED, TEST_SEED = 64, 1_000_003
# seconds between two checkpoints in training
PATIENCE = 60.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training: each step has the next task, and the next number of windows."""

    steps: int
    tasks: tuple[str, ...]
    windows: tuple[int, ...]  # of the context; 0: the facts alone


CURRICULUM = (
    Stage(110, ("place",), (0,)),
    Stage(200, ("qa1", "place"), (1, 2)),
    Stage(430, ("qa1", "place", "qa1"), (1, 2, 4)),
)
# tokens of the contexts that are asked after; those trained on are 32, 64 and 128. No step is of a
# needle: in a trial its losses were ten times the others', and clipped gradients mostly its own
LENGTHS = {
    "place": (32, 64, 128, 256, 512, 1024),
    "niah": (32, 128, 1024),
    "qa1": (0, 32, 64, 128, 256, 512, 1024, 2048, 4096),
}


@dataclasses.dataclass(frozen=True)
class OnePlace:
    """Stories of qa1 of which the one fact is told that says the answer."""

    stories: Source
    name = "place"
    size = None

    @property
    def labels(self) -> tuple[str, ...]:
        return self.stories.labels

    def story(self, number: int) -> Story:
        story = self.stories.story(number)
        person = story.question.split()[-1].rstrip("?")
        told = [fact for fact in story.facts if fact.startswith(person)]
        return Story((told[-1],), story.question, story.answer)

    def words(self) -> tuple[str, ...]:
        return distinct_words(*self.stories.words())


def task_named(name: str, seed: int, *, validation: bool) -> InBackground:
    """A task whose samples are in background text."""
    if name != "place":
        return task(name, seed=seed, validation=validation)
    qa1 = task("qa1", seed=seed, validation=validation)
    return dataclasses.replace(qa1, source=OnePlace(qa1.source))


def asking(sample: Sample) -> str:
    """The question, and how the answer begins: what a model that is not instructed goes on with."""
    question = sample.question.rstrip("?")
    person, name = question.split()[-1], question.rpartition(" of ")[2]
    begun = {"Where": f"{person} is in the", "What": f"The secret word of {name} is"}
    return f"{sample.question} {begun[question.split()[0]]}"


# --- reading -----------------------------------------------------------------------------------


class Reader(nn.Module):
    """A model of transformers that reads contexts window by window, and questions after them.

    Args:
        model: with a memory or without.
        tokenizer: its own.
    """

    def __init__(self, model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase):
        super().__init__()
        self.model = model
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)

    def count(self, text: str) -> int:
        return len(self.encode(text))

    def asked(self, samples: list[Sample]) -> Batch:
        """Contexts and questions, padded on the left, and what the answers begin with."""
        ids, mask = padded([self.encode(sample.context) for sample in samples], multiple=WINDOW)
        question = [self.encode(asking(sample)) for sample in samples]
        question_ids, question_mask = padded(question)
        labels = torch.stack([self.first_tokens((sample.answer,))[0] for sample in samples])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "question_ids": question_ids,
            "question_mask": question_mask,
            "labels": labels,
        }

    def first_tokens(self, answers: tuple[str, ...]) -> Tensor:
        return torch.tensor([self.encode(f" {answer}")[0] for answer in answers])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        labels: Tensor,
        bptt_segments: int | None = None,
    ) -> LM2Output:
        """What :func:`lm2_kernels.training.train` calls."""
        self.read(input_ids, attention_mask, bptt_segments)
        logits = self.following(question_ids, question_mask)
        return LM2Output(
            logits=logits, loss=nn.functional.cross_entropy(logits, labels), memory=None
        )

    def read(self, ids: Tensor, mask: Tensor, bptt_segments: int | None = None) -> None:
        """Read contexts into an empty memory, which is then carried."""
        memory = lm2.get_memory(self.model)
        memory.carry = True
        memory.reset()
        windows = zip(ids.split(WINDOW, 1), mask.split(WINDOW, 1), strict=True)
        for number, (window, real) in enumerate(windows):
            if bptt_segments is not None and number > 0 and number % bptt_segments == 0:
                memory.detach()
            self.model.base_model(input_ids=window, attention_mask=real, use_cache=False)

    def following(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits of what follows. (B, V)"""
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        return self.model.get_output_embeddings()(hidden[:, -1]).float()


def padded(rows: list[list[int]], multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Rows of tokens, padded on the left, and where they are."""
    length = max(map(len, rows))
    if length > multiple:
        length += -length % multiple
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = torch.tensor(row)
        mask[number, length - len(row) :] = 1
    return ids, mask


def load(folder: str, gguf: str | None) -> Reader:
    """The model as it came."""
    options = {} if gguf is None else {"gguf_file": gguf}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    )
    return Reader(model.eval(), transformers.AutoTokenizer.from_pretrained(folder, **options))


def give_memory(model: nn.Module, seed: int, candidate: str) -> Report:
    """In four blocks, evenly spread."""
    torch.manual_seed(seed)
    blocks = model.config.num_hidden_layers
    return lm2.add_memory(
        model,
        memory_slots=WINDOW,
        num_heads=model.config.num_attention_heads,
        layers=sorted({blocks * part // 5 for part in range(1, 5)}),
        candidate=candidate,
        # a question is short, and what it asks for may be in any slot
        memory_causal=False,
    )


# --- training ----------------------------------------------------------------------------------


def planned() -> list[tuple[str, int]]:
    """Task and tokens of the contexts of each step."""
    plan = []
    for stage in CURRICULUM:
        kinds = [(name, WINDOW * windows) for windows in stage.windows for name in stage.tasks]
        plan += [kinds[step % len(kinds)] for step in range(stage.steps)]
    return plan


def curves(losses: list[float]) -> dict[str, list[float]]:
    """The losses by task and tokens, each number the mean of ten of its steps."""
    found: dict[str, list[float]] = {}
    for (name, length), loss in zip(planned(), losses, strict=False):
        found.setdefault(f"{name} {length}", []).append(loss)
    return {
        kind: [round(statistics.fmean(own[i : i + 10]), 4) for i in range(0, len(own), 10)]
        for kind, own in found.items()
    }


def batches(reader: Reader, seed: int, first: int) -> Iterator[Batch]:
    """Those of a seed from a step on: a step's number says its samples."""
    tasks = {name: task_named(name, seed, validation=False) for name in LENGTHS}
    for step, (name, length) in enumerate(planned()):
        if step >= first:
            numbers = range(step * BATCH, (step + 1) * BATCH)
            yield reader.asked([tasks[name].sample(n, length, reader.count) for n in numbers])


# --- cells -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Kept:
    """What a cell has done, in a file.

    Args:
        path: of the file.
        kind: by what it was done (:func:`kind_of`).

    Raises:
        ValueError: what is there is of another kind.
    """

    path: Path
    kind: dict[str, str]
    notes: dict = dataclasses.field(init=False)
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.notes = {"kind": self.kind, "losses": [], "answers": {}, "train_seconds": 0.0}
        self.notes |= {"seconds": 0.0, "peak_bytes": 0}
        if self.path.exists():
            with safetensors.safe_open(self.path, "pt") as file:
                self.notes = json.loads(file.metadata()["notes"])
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        check_kind(self.path, self.notes.get("kind"), self.kind)
        self._last = time.monotonic()
        # the peak of what this process did before; elsewhere than on Linux it counts too
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def save(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.notes["peak_bytes"] = max(peak, self.notes["peak_bytes"])
        now = time.monotonic()
        self.notes["seconds"] += now - self._last
        self._last = now
        notes = {"notes": json.dumps(self.notes)}
        replace_file(self.path, lambda part: safetensors.torch.save_file(self.tensors, part, notes))


def kind_of(reader: Reader, options: argparse.Namespace) -> dict[str, str]:
    """What a cell's result depends on, beside its name: the model, the dtype, what it is asked."""
    told: list[object] = [CURRICULUM, LENGTHS, WINDOW, BATCH, RATE, WARMUP, TESTED]
    for name, lengths in LENGTHS.items():
        for validation in (False, True):
            some = task_named(name, TEST_SEED, validation=validation)
            for number in range(4):
                sample = some.sample(number, lengths[-1])
                told += [sample, asking(sample)]
    if (options.candidate, options.rate) != ("token", RATE):
        told += [options.candidate, options.rate]
    study = hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()
    return {"model": fingerprint(reader.model), "dtype": options.dtype, "study": study}


def check_kind(path: Path, stored: dict[str, str] | None, kind: dict[str, str]) -> None:
    """Raise ValueError unless what a file has is of a kind."""
    others = [name for name, value in kind.items() if (stored or {}).get(name) != value]
    if others:
        raise ValueError(f"{path} is of another {' and '.join(others)}: take another --out")


class TimeIsUpError(Exception):
    """The next call goes on."""


def run_plain(reader: Reader, kept: Kept, options: argparse.Namespace) -> dict:
    """The model as it came: the last window alone, and everything in one."""

    def answer(samples: list[Sample]) -> dict[str, Tensor]:
        asked = reader.asked(samples)
        # one after the other: a long context is large enough
        texts = [f"{sample.context} {asking(sample)}" for sample in samples]
        whole = [reader.following(*padded([reader.encode(text)])) for text in texts]
        return {
            "last window": reader.following(asked["question_ids"], asked["question_mask"]),
            "one window": torch.cat(whole),
        }

    ask_all(reader, kept, options, answer)
    return {}


def run_seed(reader: Reader, seed: int, kept: Kept, options: argparse.Namespace) -> dict:
    """Train a memory, and ask it."""
    model = reader.model
    probe = reader.asked([task_named("qa1", TEST_SEED, validation=True).sample(0)])
    question = probe["question_ids"], probe["question_mask"]
    with torch.no_grad(), autocast_in(torch.device("cpu"), options.autocast):
        before = reader.following(*question)
        report = give_memory(model, seed, options.candidate)
        reader.read(probe["input_ids"], probe["attention_mask"])
        kept.notes.setdefault("unchanged before", torch.equal(reader.following(*question), before))
    optimizer = torch.optim.AdamW(report.parameter_groups(lr=options.rate))
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    restore(own, optimizer, kept.tensors)

    done, begun = len(kept.notes["losses"]), time.monotonic()
    saved = begun

    def progress(step: int, steps: int, loss: float) -> bool:
        nonlocal begun, saved
        now = time.monotonic()
        kept.notes["losses"].append(round(loss, 4))
        kept.notes["train_seconds"] += now - begun
        begun = now
        is_up = now >= options.until or step == options.first
        if is_up or step == steps or now - saved > PATIENCE:
            kept.tensors = snapshot(own, optimizer)
            kept.save()
            saved = now
        if step % 20 == 0:
            latest = {kind: means[-1] for kind, means in curves(kept.notes["losses"]).items()}
            print(f"seed {seed}, step {step} of {steps}: {latest}", flush=True)
        return is_up and step < steps

    steps, last = len(planned()), options.first or len(planned())
    if done < last:
        train(
            reader,
            batches(reader, seed, done),
            steps=steps,
            first=done,
            lr=options.rate,
            warmup=WARMUP,
            optimizer=optimizer,
            autocast=options.autocast,
            progress=progress,
        )
    losses = kept.notes["losses"][:last]
    if len(losses) < last:
        raise TimeIsUpError
    trained = {
        "unchanged before": kept.notes["unchanged before"],
        "parameters": report.parameters,
        "steps": last,
        "losses": curves(losses),
        "train_minutes": round(kept.notes["train_seconds"] / 60.0, 2),
    }
    if options.first:
        return trained
    model.eval()
    memory = report.memory

    def answer(samples: list[Sample]) -> dict[str, Tensor]:
        asked = reader.asked(samples)
        reader.read(asked["input_ids"], asked["attention_mask"])
        state, found = memory.state, {}
        for whose in ("memory", "another's"):
            found[whose] = reader.following(asked["question_ids"], asked["question_mask"])
            memory.state = state.select([*range(1, len(samples)), 0])
        memory.reset()
        return found

    ask_all(reader, kept, options, answer)
    return trained


def answers(reader: Reader, name: str) -> Tensor:
    """The first tokens of all of a task's answers, which tell them apart."""
    labels = reader.first_tokens(task_named(name, TEST_SEED, validation=True).source.labels)
    if len(set(labels.tolist())) < len(labels):
        raise ValueError(f"{name}: two answers begin with one token of this model")
    return labels


# what the model says next, by what it was given (B, V)
Answer = Callable[[list[Sample]], dict[str, Tensor]]


@torch.no_grad()
def ask_all(reader: Reader, kept: Kept, options: argparse.Namespace, answer: Answer) -> None:
    """Ask every task at every length: right answers and all, by the likeliest of the task's
    answers, and by the likeliest of all tokens.
    """
    cells = [(name, length) for name, lengths in LENGTHS.items() for length in lengths]
    left = [cell for cell in cells if "{} {}".format(*cell) not in kept.notes["answers"]]
    for name, length in left:
        asked = task_named(name, TEST_SEED, validation=True)
        labels = answers(reader, name)
        right: dict[str, int] = {}
        for first in range(0, TESTED, BATCH):
            numbers = range(first, min(first + BATCH, TESTED))
            samples = [asked.sample(number, length, reader.count) for number in numbers]
            wanted = reader.first_tokens(tuple(sample.answer for sample in samples))
            with autocast_in(torch.device("cpu"), options.autocast):
                found = answer(samples)
            for how, logits in found.items():
                chosen = labels[logits[:, labels].argmax(-1)]
                for key, said in ((how, chosen), (f"{how}, any word", logits.argmax(-1))):
                    right[key] = right.get(key, 0) + int((said == wanted).sum())
        counts = {how: [number, TESTED] for how, number in right.items()}
        kept.notes["answers"][f"{name} {length}"] = counts
        kept.save()
        print(f"{name} {length}: {counts}", flush=True)
        if time.monotonic() >= options.until and (name, length) != left[-1]:
            raise TimeIsUpError


def run(cell: str | int, options: argparse.Namespace) -> dict:
    """A cell, from where it was."""
    folder = options.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    options.until = time.monotonic() + 60.0 * options.minutes
    reader = load(options.model, options.gguf)
    for name in LENGTHS:
        answers(reader, name)
    kind = kind_of(reader, options)
    for line in lines_of(options.out):
        check_kind(options.out, line.get("kind"), kind)
    kept = Kept(folder / f"{cell}.safetensors", kind)
    if cell == "plain":
        result = run_plain(reader, kept, options)
    else:
        result = run_seed(reader, cell, kept, options)
    kept.save()
    return {
        "cell": cell,
        "kind": kind,
        "command": shlex.join(["python", *sys.argv]),
        **result,
        "answers": kept.notes["answers"],
        "dtype": options.dtype,
        "minutes": round(kept.notes["seconds"] / 60.0, 2),
        "peak_bytes": kept.notes["peak_bytes"],  # of the process, at this cell
        "machine": machine.versions() | {"transformers": transformers.__version__},
        "devices": machine.devices(),
    }


def lines_of(out: Path) -> list[dict]:
    """The results that are there."""
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def snapshot(own: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, and what the optimizer knows of each."""
    found = {}
    for name, parameter in own.items():
        found[name] = parameter.detach().clone()
        for key, value in optimizer.state[parameter].items():
            found[f"{name} {key}"] = value.clone()
    return found


@torch.no_grad()
def restore(
    own: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """What :func:`snapshot` found, if anything."""
    for full, tensor in tensors.items():
        name, _, key = full.partition(" ")
        if key:
            optimizer.state[own[name]][key] = tensor
        else:
            own[name].copy_(tensor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder or name for from_pretrained")
    parser.add_argument("--gguf", metavar="FILE", help="in that folder, if it is of such a file")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="of a cell in this call; the next goes on"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--candidate", default="token", choices=("token", "read"))
    parser.add_argument("--rate", type=float, default=RATE, help="of learning")
    parser.add_argument(
        "--first", type=int, metavar="STEPS", help="of the training, and no questions after it"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    # of autocast; weights are float32
    options.autocast = torch.bfloat16 if options.dtype == "bfloat16" else None
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.touch()
    steps = len(planned())
    if options.first is not None:
        if not 1 <= options.first <= steps:
            parser.error(f"--first must be from 1 to {steps}")
        steps = options.first
    if any(line.get("steps", steps) != steps for line in lines_of(options.out)):
        parser.error(f"{options.out} has cells of other steps: take another --out")
    done = [line["cell"] for line in lines_of(options.out)]
    for cell in (*options.seeds, *(() if options.first else ("plain",))):
        if cell in done:
            continue
        try:
            result = run(cell, options)
        except TimeIsUpError:
            print(f"{cell}: not done; the same command goes on")
            continue
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
