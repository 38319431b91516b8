"""Stories of bAbI's tasks 1 to 10 without its files, in the wording of version 1.2.

Written from what the published stories show: four people who go from place to place, three objects
that they take, leave and hand on. Everybody and everything is somewhere from the start, which
nobody is told. An act is drawn as a whole, who and what kind, and drawn anew if it cannot be.
After every two statements one of the last five is drawn, and its subject is asked after if there is
a question of the task's kind, until there were five.

``tests/tools/babi_solver.py`` answers all of them, and the published ones, by rules of its own.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Protocol

from lm2_kernels.evaluation.babi import OfBabi
from lm2_kernels.evaluation.samples import Dice, Story, distinct_words, draw_story

__all__ = ["GENERATED", "BabiWorld"]

_PEOPLE = ("Mary", "John", "Sandra", "Daniel")
_GIVING_PEOPLE = ("Mary", "Fred", "Bill", "Jeff")
_UNSURE_PEOPLE = ("Mary", "Fred", "Bill", "Julie")
_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_UNSURE_PLACES = ("bedroom", "cinema", "kitchen", "office", "park", "school")
_OBJECTS = ("apple", "football", "milk")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
_NUMBERS = ("none", "one", "two", "three")
_VERBS = {
    "move": ("moved", "went", "went back", "travelled", "journeyed"),
    "get": ("took", "got", "grabbed", "picked up"),
    "drop": ("left", "dropped", "discarded", "put down"),
    "give": ("passed", "gave", "handed"),
}
_SENTENCES = {
    "move": "{} {} to the {}.",
    "get": "{} {} the {}.",
    "drop": "{} {} the {}.",
    "give": "{} {} the {} to {}.",
}
_IS_IN, _EITHER = "{} is in the {}.", "{} is either in the {} or the {}."
_IS_NOT = ("{} is not in the {}.", "{} is no longer in the {}.")
_IS_OF = "The {} is {} of the {}."
_IN = "Is {} in the {}?"
_WHERE, _WHERE_OBJECT = "Where is {}?", "Where is the {}?"
_BEFORE = "Where was the {} before the {}?"
_OF = ("What is {} of the {}?", "What is the {} {} of?")
_HOW_MANY, _CARRYING = "How many objects is {} carrying?", "What is {} carrying?"
# of who gave what to whom: a question, and which of the three is the answer
_GIVING = (
    ("What did {giver} give to {receiver}?", "thing"),
    ("Who gave the {thing}?", "giver"),
    ("Who gave the {thing} to {receiver}?", "giver"),
    ("Who received the {thing}?", "receiver"),
    ("Who did {giver} give the {thing} to?", "receiver"),
)
_QUESTIONS = 5
# statements before every question, and those that one is about
_PACE, _RECENT = 2, 5
# how many say "there" where not all do
_THERE = 0.2


@dataclasses.dataclass(frozen=True)
class _Act:
    number: int
    kind: str
    actor: str
    what: str  # the place moved to, or the thing
    receiver: str = ""


class _World:
    """Who is where and has what, and what was told of it."""

    def __init__(self, dice: Dice, people: tuple[str, ...], kinds: tuple[str, ...]):
        self.dice, self.people, self.kinds = dice, people, kinds
        self.place = {person: dice.pick(_PLACES) for person in people}
        self.lies = {thing: dice.pick(_PLACES) for thing in _OBJECTS}
        self.carried: dict[str, list[str]] = {person: [] for person in people}
        self.acts: list[_Act] = []

    def act(self) -> _Act:
        """What happens next."""
        done = None
        while done is None:
            done = self._try(self.dice.pick(self.people), self.dice.pick(self.kinds))
        self.acts.append(done)
        return done

    def _try(self, actor: str, kind: str) -> _Act | None:
        dice, number, here = self.dice, len(self.acts), self.place[actor]
        if kind == "move":
            place = dice.pick(_PLACES)
            if place == here:
                return None
            self.place[actor] = place
            return _Act(number, kind, actor, place)
        if kind == "get":
            lying = [thing for thing, place in self.lies.items() if place == here]
            if not lying:
                return None
            thing = dice.pick(lying)
            del self.lies[thing]
            self.carried[actor].append(thing)
            return _Act(number, kind, actor, thing)
        receivers = [p for p in self.people if p != actor and self.place[p] == here]
        if not self.carried[actor] or (kind == "give" and not receivers):
            return None
        thing = dice.pick(self.carried[actor])
        self.carried[actor].remove(thing)
        if kind == "drop":
            self.lies[thing] = here
            return _Act(number, kind, actor, thing)
        receiver = dice.pick(receivers)
        self.carried[receiver].append(thing)
        return _Act(number, kind, actor, thing, receiver)

    def moves(self, person: str, first: int = 0, last: int | None = None) -> list[_Act]:
        """Where a person was said to go, from one act to before another."""
        acts = self.acts[first:last]
        return [act for act in acts if act.kind == "move" and act.actor == person]

    def last_of(self, thing: str) -> _Act:
        """What was last done with a thing."""
        return next(a for a in reversed(self.acts) if a.kind != "move" and a.what == thing)


def _ask_person(world: _World, act: _Act) -> tuple[str, str] | None:
    if act.kind != "move":
        return None
    return _WHERE.format(act.actor), world.place[act.actor]


def _ask_yes_no(world: _World, act: _Act) -> tuple[str, str] | None:
    if act.kind != "move":
        return None
    return _yes_no(world.dice, act.actor, world.place[act.actor], _PLACES)


def _yes_no(dice: Dice, person: str, place: str, places: tuple[str, ...]) -> tuple[str, str]:
    if dice.chance(0.5):
        return _IN.format(person, place), "yes"
    return _IN.format(person, dice.pick([other for other in places if other != place])), "no"


def _ask_object(world: _World, act: _Act) -> tuple[str, str] | None:
    if act.kind == "move" or act != world.last_of(act.what):
        return None
    # two facts: what was done with it, and where this person went before it was left, or after it
    # was taken
    if act.kind == "drop":
        moves = world.moves(act.actor, last=act.number)
    else:
        moves = world.moves(act.actor, act.number)
    return (_WHERE_OBJECT.format(act.what), moves[-1].what) if moves else None


def _ask_object_before(world: _World, act: _Act) -> tuple[str, str] | None:
    if act.kind == "move" or act != world.last_of(act.what):
        return None
    # carried on two ways: until it was left, or until now
    if act.kind == "drop":
        gets = [other for other in world.acts if other.kind == "get" and other.what == act.what]
        moves = world.moves(act.actor, gets[-1].number, act.number)[-2:]
    else:
        moves = world.moves(act.actor, act.number)[-2:]
    if len(moves) < 2:
        return None
    before, place = (move.what for move in moves)
    return _BEFORE.format(act.what, place), before


def _ask_giving(world: _World, act: _Act) -> tuple[str, str] | None:
    gives = [other for other in world.acts if other.kind == "give"]
    if act.kind != "give" or act != [give for give in gives if give.what == act.what][-1]:
        return None
    # the first question is asked as often as two others
    form, asked = world.dice.pick((_GIVING[0], *_GIVING))
    of_both = [g for g in gives if (g.actor, g.receiver) == (act.actor, act.receiver)]
    if asked == "thing" and act != of_both[-1]:
        return None
    parts = {"giver": act.actor, "thing": act.what, "receiver": act.receiver}
    return form.format(**parts), parts[asked]


def _ask_number(world: _World, act: _Act) -> tuple[str, str] | None:
    if act.kind == "move":
        return None
    return _HOW_MANY.format(act.actor), _NUMBERS[len(world.carried[act.actor])]


def _ask_list(world: _World, act: _Act) -> tuple[str, str] | None:
    if act.kind == "move":
        return None
    return _CARRYING.format(act.actor), ",".join(world.carried[act.actor]) or "nothing"


# a line told: a statement, or a question with its answer
_Line = str | tuple[str, str]
_Ask = Callable[[_World, _Act], tuple[str, str] | None]
_HANDLING = ("move", "get", "drop")
# handing on is tried as often as this, by what the published stories hold
_GIVING_KINDS = (*_HANDLING * 2, *("give",) * 7)
_COUNTING_KINDS = (*_HANDLING, *("give",) * 4)


@dataclasses.dataclass(frozen=True)
class _Acts:
    """A task whose statements are acts."""

    ask: _Ask
    kinds: tuple[str, ...] = _HANDLING
    people: tuple[str, ...] = _PEOPLE
    there: float = 1.0  # how many are taken "there"
    questions: int = _QUESTIONS

    def tell(self, dice: Dice) -> Iterator[_Line]:
        world = _World(dice, self.people, self.kinds)
        while True:
            for _ in range(_PACE):
                yield self._text(dice, world.act())
            recent = world.acts[-_RECENT:]
            asked = (self.ask(world, act) for act in dice.several(recent, len(recent)))
            question = next(filter(None, asked), None)
            if question:
                yield question

    def _text(self, dice: Dice, act: _Act) -> str:
        verb = dice.pick(_VERBS[act.kind])
        text = _SENTENCES[act.kind].format(act.actor, verb, act.what, act.receiver)
        there = {"get": self.there, "drop": _THERE}.get(act.kind, 0.0)
        return text.removesuffix(".") + " there." if dice.chance(there) else text

    def texts(self) -> list[str]:
        kinds = dict.fromkeys(self.kinds)
        return [text for kind in kinds for text in (*_VERBS[kind], _SENTENCES[kind])]

    @property
    def names(self) -> tuple[str, ...]:
        # lists have commas
        things = (*_OBJECTS, "there", ",") if "get" in self.kinds else ()
        return (*self.people, *_PLACES, *things)


@dataclasses.dataclass(frozen=True)
class _Said:
    """A task in which people go to other places, and half the time it is said in other words."""

    unsure: bool
    people: tuple[str, ...]
    places: tuple[str, ...]
    questions: int = _QUESTIONS

    def tell(self, dice: Dice) -> Iterator[_Line]:
        place = {person: dice.pick(self.places) for person in self.people}
        # for each statement who it is about; for each person what the last one said
        subjects: list[str] = []
        said: dict[str, str] = {}
        for number in itertools.count(1):
            person = dice.pick(self.people)
            old = place[person]
            new = dice.pick([other for other in self.places if other != old])
            kind = dice.pick(("move", "move", "is", "either" if self.unsure else "not"))
            place[person], said[person] = new, old if kind == "not" else kind
            subjects.append(person)
            if kind == "move":
                yield _SENTENCES["move"].format(person, dice.pick(_VERBS["move"]), new)
            elif kind == "is":
                yield _IS_IN.format(person, new)
            elif kind == "not":
                yield dice.pick(_IS_NOT).format(person, old)
            else:
                # both may be the same one
                both = dice.several((new, dice.pick(self.places)), 2)
                yield _EITHER.format(person, *both)
                said[person] = " ".join(both)
            if number % _PACE == 0:
                yield self._ask(dice, dice.pick(subjects[-_RECENT:]), place, said)

    def _ask(
        self, dice: Dice, person: str, place: dict[str, str], said: dict[str, str]
    ) -> tuple[str, str]:
        told = said[person].split()
        if told[0] in self.places and not self.unsure:
            # where somebody is not is all that is known
            return _IN.format(person, told[0]), "no"
        question, answer = _yes_no(dice, person, place[person], self.places)
        if told[0] in self.places and any(question == _IN.format(person, p) for p in told):
            answer = "maybe"
        return question, answer

    def texts(self) -> list[str]:
        others = (_EITHER,) if self.unsure else _IS_NOT
        return [*_VERBS["move"], _SENTENCES["move"], _IS_IN, *others]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.people, *self.places)


@dataclasses.dataclass(frozen=True)
class _Directions:
    """Three places in a row, two facts and a question."""

    questions: int = 1

    def tell(self, dice: Dice) -> Iterator[_Line]:
        middle, *ends = dice.several(_PLACES, 3)
        way = dice.pick(tuple(_OPPOSITE))
        facts = []
        for end, where in zip(ends, (way, _OPPOSITE[way]), strict=True):
            fact = (end, where, middle)
            # the one in the middle is named first in a third of all
            facts.append((middle, _OPPOSITE[where], end) if dice.chance(1 / 3) else fact)
        facts = dice.several(facts, 2)
        subject, where, other = dice.pick(facts)
        if dice.chance(0.5):
            question = _OF[0].format(where, other)
        else:
            question = _OF[1].format(other, _OPPOSITE[where])
        yield from (_IS_OF.format(*fact) for fact in facts)
        yield question, subject

    def texts(self) -> list[str]:
        return [*_OPPOSITE, _IS_OF]

    @property
    def names(self) -> tuple[str, ...]:
        return _PLACES


class _Told(Protocol):
    """How stories of a task are told."""

    @property
    def questions(self) -> int:
        """Of a whole story."""

    def tell(self, dice: Dice) -> Iterator[_Line]:
        """The lines of a story."""

    def texts(self) -> list[str]:
        """Everything that its statements are made of, but for names."""

    @property
    def names(self) -> tuple[str, ...]:
        """Everybody and everything named."""


# how each task is told, and how it is asked
_TASKS: dict[str, tuple[_Told, tuple[str, ...]]] = {
    "qa1": (_Acts(_ask_person, kinds=("move",)), (_WHERE,)),
    "qa2": (_Acts(_ask_object), (_WHERE_OBJECT,)),
    "qa3": (_Acts(_ask_object_before, there=_THERE), (_BEFORE,)),
    "qa4": (_Directions(), _OF),
    "qa5": (
        _Acts(_ask_giving, kinds=_GIVING_KINDS, people=_GIVING_PEOPLE),
        tuple(question for question, _ in _GIVING),
    ),
    "qa6": (_Acts(_ask_yes_no), (_IN,)),
    "qa7": (_Acts(_ask_number, kinds=_COUNTING_KINDS), (_HOW_MANY,)),
    "qa8": (_Acts(_ask_list), (_CARRYING,)),
    "qa9": (_Said(False, _PEOPLE, _PLACES), (_IN,)),
    "qa10": (_Said(True, _UNSURE_PEOPLE, _UNSURE_PLACES), (_IN,)),
}
GENERATED = tuple(_TASKS)


@dataclasses.dataclass(frozen=True)
class BabiWorld(OfBabi):
    """Generator of one of the tasks ``qa1`` to ``qa10``.

    A story is cut at one of its five questions, which all are equally likely. Training and
    validation share no question about the same facts, whatever their seeds.

    Args:
        name: of the task.
        seed: of everything random.
        validation: whether stories for validation are told, or those for training.
        most: facts of a story; longer ones are left out.

    Raises:
        ValueError: there is no such task.
    """

    name: str
    seed: int = 0
    validation: bool = False
    most: int | None = None
    size = None

    def __post_init__(self):
        if self.name not in _TASKS:
            raise ValueError(
                f"bAbI's tasks qa1 to qa10 are generated, not {self.name!r}; all 20 are read from "
                f"the published files"
            )

    def story(self, number: int) -> Story:
        """Story ``number``: all statements before a question, and the question.

        Raises:
            ValueError: none of very many has at most ``most`` facts.
        """
        return draw_story(f"{self.name} {self.seed} {number}", self.validation, self._tell)

    def _tell(self, dice: Dice) -> Story | None:
        told = _TASKS[self.name][0]
        # of questions, those before the last are not told
        left, facts = dice.below(told.questions), []
        for line in told.tell(dice):
            if isinstance(line, str):
                facts.append(line)
                if self.most is not None and len(facts) > self.most:
                    break
            elif left:
                left -= 1
            else:
                return Story(tuple(facts), *line)
        return None

    def words(self) -> tuple[str, ...]:
        """Every word that the plain form of its stories may have."""
        told, questions = _TASKS[self.name]
        texts = [re.sub(r"{\w*}", "", text) for text in (*told.texts(), *questions)]
        return distinct_words(*texts, *told.names, *self.labels)
