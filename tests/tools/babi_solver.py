"""Answers bAbI's questions 1 to 10 from the text alone: no code or table of the generator is here.

It raises ``UnsolvedError`` for what it cannot parse, and for acts that cannot be: a thing left by
somebody who has not got it, a way to where one is, a thing taken that lies elsewhere.
"""

import re

NUMBERS = ["none", "one", "two", "three"]
# one step, in a plane
STEPS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}


class UnsolvedError(Exception):
    """The text is not understood, or contradicts itself."""


def solve(facts, question):
    """The answer to a question about statements in their order."""
    question = question.strip()
    if re.match(r"What is (the \w+ )?(north|south|east|west) of", question):
        return _direction(facts, question)
    return _Reader(facts).answer(question)


def _direction(facts, question):
    found = {}
    for fact in facts:
        match = re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", fact)
        if not match or match[2] not in STEPS:
            raise UnsolvedError(fact)
        subject, way, other = match.groups()
        x, y = STEPS[way]
        if (other, (x, y)) in found or (subject, (-x, -y)) in found:
            raise UnsolvedError(f"two places in one direction: {facts}")
        found[other, (x, y)] = subject
        found[subject, (-x, -y)] = other
    first = re.fullmatch(r"What is (\w+) of the (\w+)\?", question)
    second = re.fullmatch(r"What is the (\w+) (\w+) of\?", question)
    if first:
        key = first[2], STEPS[first[1]]
    elif second:
        # what it is north of lies to the south of it
        x, y = STEPS[second[2]]
        key = second[1], (-x, -y)
    else:
        raise UnsolvedError(question)
    if key not in found:
        raise UnsolvedError(f"{question} {facts}")
    return found[key]


class _Reader:
    """Everything that statements say, in one pass."""

    def __init__(self, facts):
        # a person's place, those of which one is right, and where a person is not
        self.at, self.may_be, self.is_not = {}, {}, {}
        self.owner, self.lies, self.bags = {}, {}, {}
        self.gifts, self.trails = [], {}
        for fact in facts:
            self._read(fact)

    def _read(self, fact):
        for pattern, reader in (
            (r"(\w+) (?:moved|went|went back|travelled|journeyed) to the (\w+)\.", self._goes),
            (r"(\w+) is in the (\w+)\.", self._goes),
            (r"(\w+) is either in the (\w+) or the (\w+)\.", self._either),
            (r"(\w+) is (?:not|no longer) in the (\w+)\.", self._absent),
            (r"(\w+) (?:took|got|grabbed|picked up) the (\w+)(?: there)?\.", self._takes),
            (r"(\w+) (?:left|dropped|discarded|put down) the (\w+)(?: there)?\.", self._leaves),
            (r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.", self._gives),
        ):
            match = re.fullmatch(pattern, fact)
            if match:
                return reader(*match.groups())
        raise UnsolvedError(fact)

    def _forget(self, person):
        for known in (self.at, self.may_be, self.is_not):
            known.pop(person, None)

    def _goes(self, person, place):
        if self.at.get(person) == place:
            raise UnsolvedError(f"{person} is in the {place} already")
        self._forget(person)
        self.at[person] = place
        for thing in self.bags.get(person, []):
            self._trail(thing, place)

    def _either(self, person, first, second):
        # "maybe" is the answer where both are one place, too
        self._forget(person)
        self.may_be[person] = {first, second}

    def _absent(self, person, place):
        if self.at.get(person, place) != place or self.is_not.get(person) == place:
            raise UnsolvedError(f"{person} was not in the {place}")
        self._forget(person)
        self.is_not[person] = place

    def _trail(self, thing, place):
        trail = self.trails.setdefault(thing, [])
        if place and (not trail or trail[-1] != place):
            trail.append(place)

    def _takes(self, person, thing):
        lies, here = self.lies.pop(thing, None), self.at.get(person)
        if thing in self.owner or (lies and here and lies != here):
            raise UnsolvedError(f"{person} cannot take the {thing}")
        self.owner[thing] = person
        self.bags.setdefault(person, []).append(thing)
        self._trail(thing, here)

    def _leaves(self, person, thing):
        if self.owner.pop(thing, None) != person:
            raise UnsolvedError(f"{person} has no {thing}")
        self.bags[person].remove(thing)
        self.lies[thing] = self.at.get(person)

    def _gives(self, giver, thing, receiver):
        here, there = self.at.get(giver), self.at.get(receiver)
        if (
            self.owner.get(thing) != giver
            or giver == receiver
            or (here and there and here != there)
        ):
            raise UnsolvedError(f"{giver} cannot give the {thing}")
        self.bags[giver].remove(thing)
        self.owner[thing] = receiver
        self.bags.setdefault(receiver, []).append(thing)
        self._trail(thing, there)
        self.gifts.append((giver, thing, receiver))

    def answer(self, question):
        for pattern, answer in (
            (r"Where is the (\w+)\?", self._where_thing),
            (r"Where is (\w+)\?", self.at.get),
            (r"Where was the (\w+) before the (\w+)\?", self._before),
            (r"Is (\w+) in the (\w+)\?", self._is_in),
            (r"How many objects is (\w+) carrying\?", self._count),
            (r"What is (\w+) carrying\?", self._list),
            (r"What did (\w+) give to (\w+)\?", lambda a, b: self._gift(a, None, b)[1]),
            (r"Who gave the (\w+)\?", lambda thing: self._gift(None, thing, None)[0]),
            (r"Who gave the (\w+) to (\w+)\?", lambda a, b: self._gift(None, a, b)[0]),
            (r"Who received the (\w+)\?", lambda thing: self._gift(None, thing, None)[2]),
            (r"Who did (\w+) give the (\w+) to\?", lambda a, b: self._gift(a, b, None)[2]),
        ):
            match = re.fullmatch(pattern, question)
            if match:
                found = answer(*match.groups())
                if found is None:
                    raise UnsolvedError(question)
                return found
        raise UnsolvedError(question)

    def _where_thing(self, thing):
        return self.at.get(self.owner[thing]) if thing in self.owner else self.lies.get(thing)

    def _before(self, thing, place):
        trail = self.trails.get(thing, [])
        # the last time that it came there
        arrivals = [number for number, there in enumerate(trail) if there == place and number]
        return trail[arrivals[-1] - 1] if arrivals else None

    def _is_in(self, person, place):
        if person in self.at:
            return "yes" if self.at[person] == place else "no"
        if person in self.may_be:
            return "maybe" if place in self.may_be[person] else "no"
        return "no" if self.is_not.get(person) == place else None

    def _count(self, person):
        return NUMBERS[len(self.bags[person])] if person in self.bags else None

    def _list(self, person):
        if person not in self.bags:
            return None
        return ",".join(self.bags[person]) or "nothing"

    def _gift(self, giver, thing, receiver):
        parts = giver, thing, receiver
        for gift in reversed(self.gifts):
            if all(asked in (None, had) for asked, had in zip(parts, gift, strict=True)):
                return gift
        raise UnsolvedError("nobody gave it")
