"""Retrieval tasks, prompts, scores, and tasks by name."""

import re

import pytest

from lm2_kernels.evaluation.babi import BABI_TASKS, LABELS
from lm2_kernels.evaluation.babi_worlds import GENERATED
from lm2_kernels.evaluation.babilong import DATASET, BabilongDataset
from lm2_kernels.evaluation.prompts import _PROMPTS, prompt
from lm2_kernels.evaluation.retrieval import Needles, Pairs, Variables
from lm2_kernels.evaluation.samples import Sample, count_words, plain
from lm2_kernels.evaluation.scoring import harness, leaderboard
from lm2_kernels.evaluation.tasks import NAMES, all_words, task
from tools.babi_solver import solve

MADE = [name for name in NAMES if name in GENERATED or name not in BABI_TASKS]


def _answer(context, question):
    """What retrieval and stories ask for, read from the text by search alone."""
    word = re.findall(r"\w+", question)[-1]
    if question.startswith("What is the secret"):
        name = re.findall(r"of (\w+ \w+)\?", question)[0]
        return re.findall(rf"The secret word of {name} is (\w+)\.", context)[0]
    if question.startswith("Which variables"):
        found = re.findall(rf"The variable (\w+) holds {word}\.", context)
        for name, other in re.findall(
            r"The variable (\w+) holds what the variable (\w+) holds\.", context
        ):
            found += [name] * (other in found)
        return ",".join(found)
    if question.startswith("where"):
        who = (re.findall(rf"{word} with (\w+)", context) or [None])[-1]
        place = re.findall(rf"{who or word} entered (\w+)", context)[-1]
        return f"{who} {place}" if who else place
    return re.findall(rf"\b{word} (\w+)\.", context)[0]


@pytest.mark.parametrize("name", ("niah", "niah_multikey", "vt", "mqar", "stories"))
@pytest.mark.parametrize("length", (0, 160))
def test_retrieval_is_right(name, length):
    made, answers = task(name), set()
    for number in range(60):
        sample = made.sample(number, length)
        assert _answer(sample.context, sample.question) == sample.answer
        assert not length or 150 < count_words(sample.context) <= length
        assert sample.answer not in sample.question
        answers.add(sample.answer)
        if sample.labels:
            assert set(sample.answer.split(",")) <= set(sample.labels)
    # no answer for all
    assert len(answers) >= 15


def test_sizes():
    assert len(Needles(16).story(0).facts) == 16
    assert Needles(1).name == "niah"
    assert Needles(2).name == "niah_multikey"
    assert len(Variables(chains=3, hops=1).story(0).facts) == 6
    assert Variables(chains=3, hops=0).story(0).answer.count(",") == 0
    assert len(Pairs(32).story(0).facts) == 32
    # the chains are mixed
    told = [Variables(hops=2).story(number).facts for number in range(20)]
    assert len({tuple("what" in fact for fact in facts) for facts in told}) == 3
    for wrong, text in (
        (lambda: Needles(17), "needles must be between 1 and 16"),
        (
            lambda: Variables(chains=4, hops=8),
            r"chains \* \(hops \+ 1\) must be at most 32, got 36",
        ),
        (lambda: Pairs(0), "pairs must be between 1 and 32"),
    ):
        with pytest.raises(ValueError, match=text):
            wrong()


@pytest.mark.parametrize("name", MADE)
def test_tasks_by_name(name):
    made = task(name)
    assert made.name == name
    first = [made.sample(number, 200) for number in range(8)]
    assert first == [task(name).sample(number, 200) for number in range(8)]
    assert first != [task(name, seed=1).sample(number, 200) for number in range(8)]
    assert first != [task(name, validation=False).sample(number, 200) for number in range(8)]
    words = set(all_words())
    for sample in first:
        assert {*plain(sample)[0].split(), *plain(sample)[1].split()} <= words


@pytest.mark.parametrize("name", ("niah", "mqar", "stories"))
def test_validation_shares_no_story(name):
    made = [
        {task(name, seed=seed, validation=validation).sample(n).context for n in range(200)}
        for validation in (False, True)
        for seed in (0, 1)
    ]
    assert not (made[0] | made[1]) & (made[2] | made[3])
    # and of each there are many
    assert min(map(len, made)) > 190


def test_vocabulary():
    words = all_words()
    assert list(words) == sorted(set(words))
    assert {"mary", ".", "?", ",", "nothing", "amber", "cellar", "fog"} <= set(words)
    # docs/evaluation.md says how many
    assert len(words) == 232


def test_names():
    assert NAMES[:20] == tuple(f"qa{number}" for number in range(1, 21))
    assert NAMES[20:] == ("niah", "niah_multikey", "vt", "mqar", "stories")
    with pytest.raises(ValueError, match="there is no task 'qa0'; there are qa1, qa2"):
        task("qa0")
    with pytest.raises(ValueError, match="qa11 is not generated: give the folder"):
        task("qa11")
    assert task("qa20", babi=DATASET) == BabilongDataset("qa20")
    with pytest.raises(ValueError, match="has backgrounds of its own"):
        task("qa20", babi=DATASET, background="prose.txt")
    with pytest.raises(ValueError, match="has samples for tests alone"):
        task("qa20", babi=DATASET, validation=False)


def test_files(tmp_path):
    line = "1 Mary is in the attic.\n2 Where is Mary?\tattic\t1\n"
    (tmp_path / "qa11_x_test.txt").write_text(line, encoding="utf-8")
    (tmp_path / "qa11_x_train.txt").write_text(line.replace("Mary", "John"), encoding="utf-8")
    (tmp_path / "prose.txt").write_text("We saw " + "the old ships, " * 9 + "all of them.")
    background = tmp_path / "prose.txt"
    sample = task("qa11", babi=tmp_path, background=background).sample(0, 40)
    assert sample.question == "Where is Mary?"
    assert sample.labels == LABELS["qa11"]
    assert "the old ships" in sample.context
    training = task("qa11", babi=str(tmp_path), validation=False)
    assert training.sample(0).question == "Where is John?"
    assert "the old ships" in task("niah", background=background).sample(0, 40).context
    # generated where no folder is given, and never by half
    with pytest.raises(FileNotFoundError, match="qa1_"):
        task("qa1", babi=tmp_path)


_PLACES = LABELS["qa1"]
# the words that retrieval and stories put around names
SENTENCES = {"the", "secret", "word", "of", "is", "variable", "holds", "what", "entered", "with"}


def _sample(task_name, question, answer):
    return Sample("", question, answer, LABELS[task_name])


WHERE = _sample("qa1", "Where is Mary?", "garden")
GIFT = _sample("qa5", "What did Bill give to Fred?", "milk")
LIST = _sample("qa8", "What is Mary carrying?", "milk,apple")
NOTHING = _sample("qa8", "What is Mary carrying?", "nothing")
NO = _sample("qa6", "Is Mary in the garden?", "no")
WAY = _sample("qa19", "How do you go from the office to the garden?", "n,w")
BEFORE = _sample("qa3", "Where was the milk before the office?", "kitchen")
FREE = Sample("", "where ball?", "mary cellar")


@pytest.mark.parametrize(
    ("sample", "prediction", "board", "target_in"),
    [
        (WHERE, "garden", True, True),
        (WHERE, " Garden.", True, True),
        (WHERE, "Mary is in the garden now. Before, she was in the office.", True, True),
        (WHERE, "The garden or the office", False, True),
        (WHERE, "I cannot say. The garden", False, True),
        (WHERE, "kitchen", False, False),
        (WHERE, "", False, False),
        (WHERE, "gardens", False, True),
        (WHERE, "garden\n<example>\nThe office", True, True),
        (WHERE, "garden <context> office", True, True),
        # as the published rule in effect
        (WHERE, "garden\nQuestion: Where is John?\nAnswer: office", False, True),
        (WHERE, "garden\nQuestion: Where is John?", True, True),
        (WHERE, "office\n<context> garden", False, True),
        # what the question names is not counted
        (GIFT, "Bill gave the milk to Fred", True, True),
        (GIFT, "Mary gave the milk to Fred", False, True),
        (GIFT, "Bill gave the apple to Fred", False, False),
        (BEFORE, "It was in the kitchen before the office", True, True),
        (BEFORE, "office", False, False),
        # sets
        (LIST, "milk,apple", True, True),
        (LIST, "apple, milk", True, False),
        (LIST, "the apple and the milk", True, False),
        (LIST, "milk", False, False),
        (LIST, "milk, apple, football", False, False),
        (LIST, "nothing", False, False),
        (NOTHING, "nothing", True, True),
        (NOTHING, "nothing but milk", False, True),
        # whole words
        (NO, "no", True, True),
        (NO, "Nothing says so", False, True),
        (NO, "no, yes", False, True),
        # an order, and not a set
        (WAY, "n,w", True, True),
        (WAY, "N, W", True, False),
        (WAY, "w,n", False, False),
        # no labels
        (FREE, "Mary cellar", True, True),
        (FREE, "cellar", False, False),
        (FREE, "I do not know. mary cellar", False, True),
    ],
)
def test_scores(sample, prediction, board, target_in):
    assert leaderboard(sample, prediction) == board
    assert harness(sample, prediction) == target_in


def test_prompt():
    sample = Sample("Mary went to the attic.", "Where is Mary?", "attic")
    text = prompt("qa1", sample)
    instruction, post = _PROMPTS["qa1"].task, _PROMPTS["qa1"].answer
    first = _PROMPTS["qa1"].examples[0]
    assert text.startswith(
        f"{instruction}\n\n<example>\n{first[0]}\nQuestion: {first[1]}\nAnswer: {first[2]}\n"
        f"</example>\n\n"
    )
    assert text.endswith(
        f"\n</example>\n\n{post}\n\n<context>\nMary went to the attic.\n</context>\n"
        f"Question: Where is Mary?\nAnswer:"
    )
    with pytest.raises(ValueError, match="no prompt for 'qa0', but for qa1,"):
        prompt("qa0", sample)


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_prompts_are_right(name):
    for context, question, answer in _PROMPTS[name].examples:
        labels = LABELS.get(name) or getattr(task(name).sample(0), "labels", ())
        if name not in BABI_TASKS:
            # what they tell is told by no sample
            names = {*re.findall(r"\w+", context)} & set(task(name).source.words())
            assert names <= SENTENCES
            labels = answer.split(",")
        assert leaderboard(Sample(context, question, answer, tuple(labels)), answer)
        if name in GENERATED:
            assert solve(re.findall(r"[^.]+\.", context.replace(". ", ".")), question) == answer
        elif name not in BABI_TASKS:
            assert _answer(context, question) == answer
        assert question.endswith("?")
    assert set(_PROMPTS) == set(NAMES)
