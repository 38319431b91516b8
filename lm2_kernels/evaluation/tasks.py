"""Tasks by name, as the commands take them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from lm2_kernels.evaluation.babi import BABI_TASKS, BabiFiles
from lm2_kernels.evaluation.babi_worlds import GENERATED, BabiWorld
from lm2_kernels.evaluation.babilong import DATASET, BabilongDataset, InBackground
from lm2_kernels.evaluation.background import Background, FileText, NeutralText
from lm2_kernels.evaluation.retrieval import Needles, Pairs, Variables
from lm2_kernels.evaluation.samples import Dice, Source, Story, Task, distinct_words
from lm2_kernels.evaluation.stories import PAD, QATask

__all__ = ["NAMES", "Stories", "all_words", "task"]

# needles of the multi-key task, as in RULER
_NEEDLES = 4
# what BABILong reckons for one fact
_TOKENS_PER_FACT = 8


@dataclasses.dataclass(frozen=True)
class Stories:
    """The stories of :class:`~lm2_kernels.evaluation.QATask`, one question each.

    Args:
        seed: of everything random.
        validation: whether stories for validation are told, or those for training.
        task: their sizes; its segments do not matter here.
    """

    seed: int = 0
    validation: bool = False
    task: QATask = dataclasses.field(default_factory=QATask)
    name = "stories"
    labels = ()
    size = None

    def story(self, number: int) -> Story:
        """Facts such as "mary entered garden", and a question such as "where mary"."""
        # its own split, which no order of sentences gets round
        seed = Dice(f"{self.name} {self.seed} {number}").below(2**53)
        example = next(self.task.examples(seed, validation=self.validation))
        (question,) = example.questions
        # without signs, which the models of these stories do not know
        facts = tuple(" ".join(sentence) for sentence in example.sentences)
        return Story(facts, f"where {question.subject}", " ".join(question.answer))

    def words(self) -> tuple[str, ...]:
        """Every word of the plain form."""
        known = (word for word in self.task.vocabulary.words if word != PAD)
        return distinct_words(*known)


_SOURCES: dict[str, Callable[[int, bool], Source]] = {
    **{
        name: lambda seed, validation, name=name: BabiWorld(name, seed, validation)
        for name in GENERATED
    },
    "niah": lambda seed, validation: Needles(1, seed, validation),
    "niah_multikey": lambda seed, validation: Needles(_NEEDLES, seed, validation),
    "vt": lambda seed, validation: Variables(seed=seed, validation=validation),
    "mqar": lambda seed, validation: Pairs(seed=seed, validation=validation),
    "stories": Stories,
}
NAMES = (*BABI_TASKS, *(name for name in _SOURCES if name not in BABI_TASKS))


def task(
    name: str,
    *,
    seed: int = 0,
    babi: str | Path | None = None,
    background: str | Path | None = None,
    validation: bool = True,
) -> Task:
    """The task of a name.

    Args:
        name: ``qa1`` to ``qa10`` are generated, or like ``qa11`` to ``qa20`` read from published
            files; ``niah``, ``niah_multikey``, ``vt``, ``mqar``, ``stories``.
        seed: of all that is generated, and of where facts are put.
        babi: a folder of bAbI's files; or ``RMT-team/babilong``, which ``datasets`` loads with its
            own backgrounds.
        background: a text file in UTF-8; generated sentences unless given.
        validation: samples for validation (of files, the test files), or those for training.

    Raises:
        OSError: a file cannot be read.
        ValueError: there is no such task, or not without ``babi``; or a file is damaged, or does
            not go with ``babi``.
    """
    if name not in NAMES:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(NAMES)}")
    if name in BABI_TASKS and babi is not None:
        if str(babi) == DATASET and not Path(babi).exists():
            if background is not None:
                raise ValueError(f"{DATASET} has backgrounds of its own, and none is put into it")
            if not validation:
                raise ValueError(f"{DATASET} has samples for tests alone; bAbI's files have others")
            return BabilongDataset(name)
        source: Source = BabiFiles(babi, name, validation)
    elif name in _SOURCES:
        source = _SOURCES[name](seed, validation)
    else:
        raise ValueError(
            f"{name} is not generated: give the folder of bAbI's files, tasks_1-20_v1-2/en-10k"
        )
    text: Background = NeutralText() if background is None else FileText(background)
    return InBackground(source, text, seed, _TOKENS_PER_FACT if name in BABI_TASKS else 0)


def all_words() -> tuple[str, ...]:
    """Every word of every generated task and of the generated background, in order, each once.

    The plain forms of their samples have no other: a vocabulary for models of few words.
    """
    words = set(NeutralText().words())
    for source in _SOURCES.values():
        words.update(source(0, True).words())
    return tuple(sorted(words))
