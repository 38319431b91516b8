"""Asking tasks: what is counted and kept, what goes on and what is refused, tables and pictures."""

import dataclasses
import json
import math
import re
import sys

import pytest
import torch

from lm2_kernels.evaluation.accuracy import Accuracy
from lm2_kernels.evaluation.asking import ask
from lm2_kernels.evaluation.babi_worlds import GENERATED
from lm2_kernels.evaluation.layout import Layout, words
from lm2_kernels.evaluation.reading import Reader
from lm2_kernels.evaluation.results import Cell, Results, length_name
from lm2_kernels.evaluation.samples import Sample
from lm2_kernels.evaluation.tasks import all_words, task
from lm2_kernels.training.data import Bytes, Words

PLACES = ("garden", "kitchen", "office")
WORDS = Words((*PLACES, "mary", "is", "in", "the", "where", "?", ".", "rain", "and"))
COMMAS = Words((*WORDS.words, ","))
MARKS = [word for word in WORDS.words if word.isalpha() and word not in PLACES]


class Where:
    """Told where Mary is; the last place that is named is not always hers."""

    def __init__(self, name="where", shift=0):
        self.name, self.shift, self.numbers = name, shift, []

    def sample(self, number, length=0, count=None):
        self.numbers.append(number)
        # no two are the same
        facts = f"{MARKS[number // 7 % 7]} {MARKS[number % 7]}. "
        facts += f"Mary is in the {PLACES[(number + self.shift) % 3]}."
        if number % 10 >= 8:
            # rows of unequal lengths
            facts += " Rain and rain." * 3
        if length and length < 10:
            raise ValueError("no story fits")
        while length and count(f"{facts} Rain.") <= length:
            facts += " Rain."
        if number % 4 == 3:
            facts += " In the office."
        answer = PLACES[(number + self.shift) % 3]
        return Sample(facts, "Where is Mary?", answer, PLACES)


class LastPlace:
    """Says the place that was named last, and then something."""

    def __init__(self, tokenizer=WORDS):
        self.tokenizer = tokenizer
        self.calls = []

    def __call__(self, ids):
        self.calls.append(tuple(ids.shape))
        logits = torch.zeros(*ids.shape, WORDS.vocab_size)
        for row, tokens in enumerate(ids.tolist()):
            last = [token for token in tokens if token < len(PLACES)][-1]
            logits[row, -1, last if tokens[-1] == WORDS.words.index("?") else 7] = 1.0
        return logits


def _ask(lengths=(0,), tasks=None, model=None, **options):
    reader = Reader(model or LastPlace(), WORDS)
    return ask(reader, tasks or [Where()], lengths, **{"samples": 20, **options})


def _right(number):
    """Whether sample ``number`` of Where is answered by the place named last."""
    return number % 4 != 3 or PLACES[number % 3] == "office"


def test_right_answers_are_counted():
    results = _ask((0, 12))
    cell = results.cell("where", 0)
    right = sum(map(_right, range(20)))
    assert 0 < right < 20
    assert cell.accuracy("leaderboard") == cell.accuracy("harness") == Accuracy(right, 20)
    with pytest.raises(KeyError, match="no answers to where at 1k"):
        results.cell("where", 1000)


def test_batches_do_not_matter():
    wanted = _ask((0, 12), batch=1, keep_answers=True)
    for batch in (3, 50):
        results = _ask((0, 12), batch=batch, keep_answers=True)
        for got, want in zip(results.cells, wanted.cells, strict=True):
            got.minutes = want.minutes
            assert got == want
    (answer, *_) = wanted.cells[0].answers
    assert answer == {
        "number": 0, "answer": "garden", "wanted": "garden", "leaderboard": True, "harness": True,
    }  # fmt: skip


def test_lists_of_words():
    """In the plain form "milk,football" has blanks, and is right by both rules."""

    class Carried(Where):
        def sample(self, *args):
            sample = super().sample(*args)
            return Sample(sample.context, "Where is Mary?", "garden,office", PLACES)

    class Says(LastPlace):
        def __call__(self, ids):
            logits = torch.zeros(*ids.shape, COMMAS.vocab_size)
            ends = {"?": "garden", "garden": ",", ",": "office"}
            for row, tokens in enumerate(ids.tolist()):
                last = ends.get(COMMAS.words[tokens[-1]], "?")
                logits[row, -1, COMMAS.words.index(last)] = 1.0
            return logits

    results = ask(Reader(Says(), COMMAS), [Carried()], [0], samples=3, keep_answers=True)
    cell = results.cells[0]
    assert cell.answers[0]["answer"] == "garden , office"
    assert (cell.leaderboard, cell.harness) == (3, 3)


def test_no_sample_is_asked_twice():
    """Of a file of questions no more are asked than there are."""
    task = Where()
    task.available = lambda length, count: {0: 7, 12: None}[length]
    results = _ask((0, 12), [task])
    assert [(cell.samples, cell.asked) for cell in results.cells] == [(7, 7), (20, 20)]
    _ask((0, 12), [task], results=results)


class Repeated(Where):
    def sample(self, number, *args):
        return super().sample(number // 3, *args)


def test_no_prompt_is_counted_twice():
    """Of those that are the same the first is asked, also where a run goes on."""
    wanted = [0, 3, 6, 9, 12, 15, 18]
    for batches in (1, 9):
        results = _ask(
            tasks=[Repeated()],
            batch=2,
            keep_answers=True,
            after=lambda results, _, most=batches: results.cells[0].asked >= 2 * most,
        )
        _ask(tasks=[Repeated()], keep_answers=True, results=results)
        (cell,) = results.cells
        assert [answer["number"] for answer in cell.answers] == wanted
        assert (cell.samples, cell.asked) == (7, 7)


def test_the_plain_form_ends_where_the_answer_does():
    model = LastPlace()
    results = _ask(model=model, batch=1, samples=4, keep_answers=True)
    assert [answer["answer"] for answer in results.cells[0].answers[:3]] == list(PLACES)
    assert len(model.calls) == 4


class Spoken:
    """A reader of text that takes down what it is asked."""

    def __init__(self):
        self.prompts, self.limits = [], []
        self.knows_words_alone, self.window, self.prompt = False, None, None
        self.device = torch.device("cpu")

    def fingerprint(self):
        return ""

    def count(self, text):
        return len(text)

    def check(self, prompt, tokens):
        pass

    def answer(self, prompts, tokens):
        self.prompts += prompts
        self.limits += tokens
        return ["The garden."] * len(prompts)


def test_prompts():
    spoken = Spoken()
    results = ask(spoken, [Where("qa1")], [0], samples=2, tokens=9)
    # " kitchen" has eight letters
    assert spoken.limits == [9, 9]
    ask(spoken, [Where("qa1")], [0], samples=1, tokens=1)
    assert spoken.limits.pop() == 8
    del spoken.prompts[2:]
    assert spoken.prompts[1].endswith(
        "<context>\nmary is. Mary is in the kitchen.\n</context>\nQuestion: Where is Mary?\nAnswer:"
    )
    assert "<example>" in spoken.prompts[1]
    assert results.options["prompt"] == "babilong"
    ask(spoken, [Where()], [0], samples=2, tokens=7, prompt="plain")
    assert spoken.prompts[-1] == "mary is . mary is in the kitchen . where is mary ?"
    # " garden" has seven letters, " kitchen" eight
    assert spoken.limits[2:] == [7, 8]


# --- going on ----------------------------------------------------------------------------------


def _same(got, want):
    assert got.options == want.options
    for one, other in zip(got.cells, want.cells, strict=True):
        one.minutes = other.minutes
        assert one == other


def test_what_was_cut_goes_on(tmp_path):
    path, wanted = tmp_path / "results.json", _ask((0, 12), keep_answers=True)
    seen = []

    def after(results, is_done):
        seen.append(is_done)
        results.write(path)
        return len(seen) == 4

    cut = _ask((0, 12), batch=6, keep_answers=True, after=after)
    # the fourth batch ended the first cell
    assert seen == [False, False, False, True]
    assert [cell.asked for cell in cut.cells] == [20, 0]
    for batches in (1, 2, 3):
        del seen[:]
        cut = Results.read(path)
        asked = [cell.asked for cell in cut.cells]

        def after(results, is_done, most=batches):
            seen.append(is_done)
            results.write(path)
            return len(seen) == most

        task = Where()
        _ask((0, 12), [task], batch=3, keep_answers=True, results=cut, after=after)
        # all samples are looked at, and what is done is not asked again
        assert task.numbers[:40] == [*range(20)] * 2
        assert task.numbers[40:] == list(range(asked[1], min(asked[1] + 3 * batches, 20)))
    again = Results.read(path)
    _ask((0, 12), keep_answers=True, results=again)
    _same(Results.read(path), cut)
    _same(again, wanted)
    assert len(again.runs) == 5
    # nothing left, nothing done
    model = LastPlace()
    _ask((0, 12), model=model, keep_answers=True, results=again)
    assert not model.calls
    assert len(again.runs) == 5


def test_other_tasks_join():
    results = _ask()
    _ask((12,), [Where("there", 1)], results=results)
    _same(results, _joined(_ask(), _ask((12,), [Where("there", 1)])))


def _joined(one, other):
    return Results(one.options, [*one.runs, *other.runs], [*one.cells, *other.cells])


class Late(Where):
    """Whose last sample is another, as of a file that has changed."""

    def sample(self, number, *args):
        return super().sample(number + number // 19, *args)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"samples": 21}, "the results are of samples 20, not 21"),
        ({"tokens": 3}, "of tokens 20, not 3"),
        ({"notes": {"seed": 1}}, "of seed 0, not 1"),
        ({"tasks": [Where(shift=1)]}, "of other samples of where at 0k"),
        ({"tasks": [Late()]}, "of other samples of where at 0k"),
        ({"keep_answers": True}, "lack answers of where at 0k"),
    ],
)
def test_other_options_are_refused(options, text):
    results = _ask(notes={"seed": 0})
    before = json.dumps(results.to_dict())
    with pytest.raises(ValueError, match=text):
        _ask(**{"notes": {"seed": 0}, **options}, results=results)
    assert json.dumps(results.to_dict()) == before


def test_another_model_is_refused():
    def reader(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Embedding(12, 4), torch.nn.Linear(4, 12))
        return Reader(model, WORDS)

    results = ask(reader(0), [Where()], [0], samples=2)
    ask(reader(0), [Where()], [0], samples=2, results=results)
    with pytest.raises(ValueError, match="of a model with other weights or options"):
        ask(reader(1), [Where()], [0], samples=2, results=results)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"lengths": (-1,)}, "lengths must be at least 0"),
        ({"prompt": "other"}, "one of babilong, plain.* got 'other'"),
        ({"prompt": "babilong"}, "it takes the prompts plain and aligned"),
    ],
)
def test_what_cannot_be_asked(options, text):
    with pytest.raises(ValueError, match=text):
        _ask(**options)


def test_all_samples_are_looked_at_before_the_work():
    model, results = LastPlace(), _ask()
    asked = list(model.calls)
    with pytest.raises(ValueError, match=r"^where at 5, sample 0: no story fits"):
        _ask((0, 5), model=model)

    class Strange(Where):
        def sample(self, number, *args):
            sample = super().sample(number, *args)
            return dataclasses.replace(sample, context="Snow.") if number == 9 else sample

    with pytest.raises(ValueError, match=r"^strange at 0k, sample 9: .* knows .* and not snow"):
        _ask((0, 12), [Where(), Strange("strange")], model=model, results=results)
    # not by half
    assert [(cell.task, cell.length) for cell in results.cells] == [("where", 0)]

    class Unsayable(Where):
        def sample(self, *args):
            return dataclasses.replace(super().sample(*args), answer="Attic")

    with pytest.raises(ValueError, match=r"^attic at 0k, sample 0: .* knows .* and not attic"):
        _ask((0,), [Where(), Unsayable("attic")], model=model)
    assert model.calls == asked


# --- what is shown -----------------------------------------------------------------------------


@pytest.mark.parametrize("confidence, z", [(0.95, 1.959963984540054), (0.5, 0.6744897501960817)])
def test_wilson(confidence, z):
    """Its ends are the shares from which the seen one is z standard errors away."""
    for total in (1, 7, 500):
        for right in {0, 1, total // 3, total}:
            accuracy = Accuracy(right, total)
            low, high = accuracy.interval(confidence)
            assert 0.0 <= low <= accuracy.share <= high <= 1.0
            assert low < high
            for end, side in ((low, 1), (high, -1)):
                if end not in (0.0, 1.0):
                    error = math.sqrt(end * (1.0 - end) / total)
                    assert side * (accuracy.share - end) / error == pytest.approx(z)
            # none right: from 0 on, and all right: the mirror image
            mirrored = Accuracy(total - right, total).interval(confidence)
            assert mirrored == pytest.approx((1.0 - high, 1.0 - low))
    assert Accuracy(0, 10).interval()[0] == 0.0 < Accuracy(0, 10).interval()[1] < 0.3
    assert Accuracy(0, 0).interval() == (0.0, 1.0)
    for wrong in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="confidence must be between 0 and 1"):
            Accuracy(1, 2).interval(wrong)


def test_json_holds_what_is_needed_to_trust_it(tmp_path):
    results = _ask((0, 12), command=["evaluate", "x"], notes={"seed": 3})
    results.write(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["options"]["seed"] == 3
    assert content["options"].keys() >= {"model", "device", "samples", "tokens", "prompt"}
    (run,) = content["runs"]
    assert run["command"] == ["evaluate", "x"]
    assert run["versions"].keys() >= {"lm2_kernels", "torch", "transformers"}
    assert run["devices"][0]["device"] == "cpu"
    first = content["cells"][0]
    assert run["minutes"] == pytest.approx(sum(cell["minutes"] for cell in content["cells"]))
    cell = results.cells[0]
    assert first["leaderboard"] == {
        "right": cell.leaderboard,
        "share": cell.leaderboard / 20,
        "interval": list(cell.accuracy("leaderboard").interval()),
    }
    assert "answers" not in first
    _same(Results.read(tmp_path / "a.json"), results)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["cells"][0].pop("asked"),
        lambda content: content["cells"][0].update(asked="2"),
        lambda content: content["cells"][0].update(asked=3),
        lambda content: content["cells"][0].update(samples="2"),
        lambda content: content["cells"][0].update(minutes=None),
        lambda content: content["cells"][0].update(task=1),
        lambda content: content["cells"][0]["harness"].update(right=3),
        lambda content: content["cells"][0].update(leaderboard=3),
        lambda content: content.update(cells=3),
    ],
)
def test_damaged_files(tmp_path, change):
    path = tmp_path / "a.json"
    _ask(samples=2).write(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a.json is damaged"):
        Results.read(path)


def test_files_of_others_are_left_alone(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"cells": []}')
    for call in (Results.read, _ask(samples=2).write):
        with pytest.raises(ValueError, match="JSON of something else"):
            call(path)
    assert path.read_text() == '{"cells": []}'


def test_progress():
    shown = []

    class Bar:
        def __init__(self, *args):
            shown.append(args)

        def show(self, *args):
            shown.append(args)

        def close(self):
            shown.append("closed")

    _ask((0, 12), samples=4, batch=3, progress=Bar)
    looked = [("looking at prompts", 0), (1, 2, "where 0k"), (2, 2, "where 12"), "closed"]
    assert shown[:4] == looked
    asked = [("where 0k", 0), (3, 4, "right 100.0 %"), (4, 4, "right 75.0 %"), "closed"]
    assert shown[4:8] == asked
    assert shown[8] == ("where 12", 0)


def test_table_and_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    cells = [
        Cell("qa1", 0, 20, 20, leaderboard=5, harness=10),
        Cell("qa1", 1000, 20, 4, leaderboard=4),
    ]
    results = Results({}, [], [*cells, Cell("qa10", 500, 20, 20, harness=20)])
    lines = results.table().splitlines()
    low, high = (100 * end for end in Accuracy(5, 20).interval())
    assert lines[1].split() == ["0k", "500", "1k"]
    assert re.match(
        rf"  qa1   25\.0 \[{low:.1f}, {high:.1f}\]  -  +100\.0 \[51.0, 100.0\]", lines[2]
    )
    assert lines[3].split()[:3] == ["qa10", "-", "0.0"]
    assert lines[-1] == "qa1 at 1k: 4 of 20 asked"
    assert "harness" in lines[5]
    files = results.plot(tmp_path / "new")
    assert [file.name for file in files] == ["answers.png", "answers.svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    first = files[1].read_bytes()
    results.cells[0].leaderboard += 1
    results.plot(tmp_path / "new")
    assert files[1].read_bytes() != first
    for path in (files[0], files[0] / "new" / "er"):
        with pytest.raises(ValueError, match=r"answers.png is no folder"):
            results.plot(path)


def test_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="plots need matplotlib"):
        Results({}).plot(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_names_of_lengths():
    assert list(map(length_name, (0, 1000, 1500, 128_000))) == ["0k", "1k", "1500", "128k"]


def test_bytes_read_the_published_form():
    """A tokenizer of text, whatever it makes of it."""

    def model(ids):
        return torch.zeros(*ids.shape, 256)

    results = ask(Reader(model, Bytes()), [Where("qa1")], [0], samples=2, tokens=2)
    assert (results.cells[0].leaderboard, results.cells[0].asked) == (0, 2)
    with pytest.raises(ValueError, match="no prompt for 'where'"):
        ask(Reader(model, Bytes()), [Where()], [0])


# --- what was learnt is right -------------------------------------------------------------------


class Oracle(Reader):
    """Says what a layout's rows would teach, and then more, as long as it may."""

    def __init__(self, tokenizer, kind):
        super().__init__(len, tokenizer)
        self.aligned, self.said = Layout(tokenizer, 64, kind), {}

    def layout(self):
        return self.aligned

    def learn(self, task, length, samples):
        segments = -(-length // 64) or None
        for number in range(samples):
            sample = task.sample(number, length, self.aligned.count)
            row = self.aligned.row(sample, segments)
            self.said[self.tokenizer.decode(row.prompt)] = row.answer

    def answer(self, prompts, tokens):
        more = self.tokenizer.encode(" , milk , apple , football") * 99
        return [
            self.tokenizer.decode([*self.said[prompt], *more][:most])
            for prompt, most in zip(prompts, tokens, strict=True)
        ]


@pytest.mark.parametrize("kind", ("running", "aligned"))
@pytest.mark.parametrize("tokenizer", (Bytes(), words(all_words())), ids=("bytes", "words"))
def test_what_was_learnt_is_right(tokenizer, kind):
    """Of every task; of the same samples as in training, and however long the answers are."""
    oracle = Oracle(tokenizer, kind)
    asked = [task(name) for name in (*GENERATED, "niah", "niah_multikey", "vt", "mqar", "stories")]
    for some in asked:
        assert some.sample(0).listed == {"qa8": 3, "vt": 5}.get(some.name, 1)
        for length in (0, 900):
            oracle.learn(some, length, 2)
    prompt = {"running": "plain", "aligned": "aligned"}[kind]
    results = ask(oracle, asked, (0, 900), samples=2, tokens=1, prompt=prompt)
    for cell in results.cells:
        assert (cell.leaderboard, cell.harness) == (cell.asked, cell.asked), cell
        assert cell.asked == 2


class Carried:
    """Lists of one to three things."""

    name = "carried"
    answers = ("milk", "milk,apple", "apple,milk,football", "nothing")

    def sample(self, number, length=0, count=None):
        labels = ("nothing", "apple", "football", "milk")
        question = f"What is {('Mary', 'John', 'Sandra', 'Daniel')[number]} carrying?"
        return Sample("Mary went back.", question, self.answers[number], labels, 3)


@pytest.mark.parametrize("kind", ("running", "aligned"))
def test_a_list_is_right_up_to_its_end(kind):
    """Whoever names three things is right where there are three; nothing tells how many."""
    oracle, carried = Oracle(words(all_words()), kind), Carried()
    oracle.learn(carried, 0, 4)
    places = {prompt.split().index("carrying") for prompt in oracle.said}
    assert len(places) == 1
    said = oracle.tokenizer.encode("milk , football , apple .")
    oracle.said = dict.fromkeys(oracle.said, said)
    prompt = {"running": "plain", "aligned": "aligned"}[kind]
    (cell,) = ask(oracle, [carried], [0], samples=4, prompt=prompt, keep_answers=True).cells
    assert {answer["answer"] for answer in cell.answers} == {"milk , football , apple"}
    assert [answer["leaderboard"] for answer in cell.answers] == [False, False, True, False]
