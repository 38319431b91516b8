"""Retrieval in words: needles, variables, pairs of key and value.

The tasks are those by which the field tests long contexts and recurrent memories, written anew;
each docstring says what is different here. Keys and values are single words of two lists, so that
models of few words can take part; none is a word of bAbI or of the neutral background.
"""

import dataclasses

from lm2_kernels.checks import check_int
from lm2_kernels.evaluation.samples import Dice, Story, distinct_words, draw_story

__all__ = ["Needles", "Pairs", "Variables"]

_KEYS = (
    "amber", "birch", "cedar", "coral", "ember", "fern", "flint", "garnet", "hazel", "iris",
    "ivory", "jade", "juniper", "lotus", "maple", "moss", "nectar", "onyx", "opal", "pearl",
    "pine", "quartz", "raven", "reed", "ruby", "saffron", "sage", "topaz", "tulip", "velvet",
    "violet", "willow",
)  # fmt: skip
_VALUES = (
    "anchor", "basket", "bell", "button", "candle", "carpet", "clock", "compass", "copper",
    "cradle", "dagger", "drum", "feather", "fiddle", "hammer", "kettle", "ladder", "lantern",
    "marble", "mirror", "nutmeg", "paddle", "pepper", "pillow", "ribbon", "saddle", "sickle",
    "spoon", "thimble", "trumpet", "wagon", "whistle",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Needles:
    """One fact is asked after: ``niah`` tells one, ``niah_multikey`` more of other keys.

    After RULER (https://arxiv.org/abs/2404.06654), niah_single and niah_multikey, where keys, and
    values of seven digits, are drawn anew and the background is repeated noise or essays. A key has
    two words, no two keys of a story share one, and a value is one word: 31 744 facts.

    Args:
        needles: how many facts are told, at most 16.
        seed: of everything random.
        validation: whether stories for validation are told, or those for training.
    """

    needles: int = 1
    seed: int = 0
    validation: bool = False
    labels = _VALUES
    size = None

    def __post_init__(self):
        check_int("Needles", "needles", self.needles, 1, len(_KEYS) // 2)

    @property
    def name(self) -> str:
        """``niah`` of one needle, or ``niah_multikey``."""
        return "niah" if self.needles == 1 else "niah_multikey"

    def story(self, number: int) -> Story:
        """Facts such as "The secret word of cedar moss is lantern.", and a question about one."""
        return draw_story(f"{self.name} {self.seed} {number}", self.validation, self._tell)

    def _tell(self, dice: Dice) -> Story:
        words, values = dice.several(_KEYS, 2 * self.needles), dice.several(_VALUES, self.needles)
        keys = [" ".join(words[first : first + 2]) for first in range(0, len(words), 2)]
        facts = [
            f"The secret word of {key} is {value}." for key, value in zip(keys, values, strict=True)
        ]
        asked = dice.below(self.needles)
        return Story(tuple(facts), f"What is the secret word of {keys[asked]}?", values[asked])

    def words(self) -> tuple[str, ...]:
        """Every word of the plain form."""
        return distinct_words("The secret word of is . What is the ?", *_KEYS, *_VALUES)


@dataclasses.dataclass(frozen=True)
class Variables:
    """Variable tracking, ``vt``: all variables that hold a value, directly or by others.

    After RULER, whose default is one chain of five variables, with values of five digits and names
    of five letters; here there is a second chain, so that naming every variable is wrong, and the
    statements are sentences.

    Args:
        chains: of variables, each with a value of its own.
        hops: from a chain's first variable to its last.
        seed: of everything random.
        validation: whether stories for validation are told, or those for training.
    """

    chains: int = 2
    hops: int = 4
    seed: int = 0
    validation: bool = False
    name = "vt"
    labels = _KEYS
    size = None

    @property
    def listed(self) -> int:
        """How many variables hold one value."""
        return self.hops + 1

    def __post_init__(self):
        check_int("Variables", "chains", self.chains, 1, len(_VALUES))
        check_int("Variables", "hops", self.hops, 0)
        if self.chains * (self.hops + 1) > len(_KEYS):
            raise ValueError(
                f"Variables: chains * (hops + 1) must be at most {len(_KEYS)}, "
                f"got {self.chains * (self.hops + 1)}"
            )

    def story(self, number: int) -> Story:
        """Facts such as "The variable reed holds what the variable opal holds."."""
        return draw_story(f"{self.name} {self.seed} {number}", self.validation, self._tell)

    def _tell(self, dice: Dice) -> Story:
        length = self.hops + 1
        keys, values = dice.several(_KEYS, self.chains * length), dice.several(_VALUES, self.chains)
        chains = [keys[first : first + length] for first in range(0, len(keys), length)]
        told, facts = [0] * self.chains, []
        while sum(told) < len(keys):
            chain = dice.pick([c for c in range(self.chains) if told[c] < length])
            key = chains[chain][told[chain]]
            if told[chain]:
                facts.append(
                    f"The variable {key} holds what the variable {chains[chain][told[chain] - 1]} "
                    f"holds."
                )
            else:
                facts.append(f"The variable {key} holds {values[chain]}.")
            told[chain] += 1
        asked = dice.below(self.chains)
        return Story(
            tuple(facts), f"Which variables hold {values[asked]}?", ",".join(chains[asked])
        )

    def words(self) -> tuple[str, ...]:
        """Every word of the plain form."""
        texts = ("The variable holds what the variable holds.", "Which variables hold?", ",")
        return distinct_words(*texts, *_KEYS, *_VALUES)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Associative recall, ``mqar``: pairs of a key and a value, and one key is asked after.

    After MQAR of Zoology (https://arxiv.org/abs/2312.04927), where all keys are asked after, at
    distances drawn by a power law, each query a token of the sequence itself, and what is between
    is filled by one token. Here a sample has one query, behind everything, and background between
    the pairs.

    Args:
        pairs: how many, at most 32; each of another key.
        seed: of everything random.
        validation: whether stories for validation are told, or those for training.
    """

    pairs: int = 8
    seed: int = 0
    validation: bool = False
    name = "mqar"
    labels = _VALUES
    size = None

    def __post_init__(self):
        check_int("Pairs", "pairs", self.pairs, 1, len(_KEYS))

    def story(self, number: int) -> Story:
        """Facts such as "cedar lantern.", and the question "cedar?"."""
        return draw_story(f"{self.name} {self.seed} {number}", self.validation, self._tell)

    def _tell(self, dice: Dice) -> Story:
        keys = dice.several(_KEYS, self.pairs)
        values = [dice.pick(_VALUES) for _ in keys]
        asked = dice.below(self.pairs)
        facts = tuple(f"{key} {value}." for key, value in zip(keys, values, strict=True))
        return Story(facts, f"{keys[asked]}?", values[asked])

    def words(self) -> tuple[str, ...]:
        """Every word of the plain form."""
        return distinct_words(". ?", *_KEYS, *_VALUES)
