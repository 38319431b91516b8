"""Which size the samples of a step have: short ones first, as memories learn.

A schedule is a list of stages. Each takes a share of the run's steps, and each of its steps has one
of the stage's sizes, drawn evenly. The size of a step is a function of the seed, the step and the
number of steps alone: a run that goes on sees what the uncut one would, and so does every process.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from lm2_kernels.checks import check_int

__all__ = ["SCHEDULES", "Curriculum", "Stage", "curriculum"]

SCHEDULES = ("stairs", "ramp", "mixed")
# of a ramp: how many levels it has at most, and the share of the run after which it is at the top
_LEVELS, _RAMP = 64, 0.5


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run.

    Args:
        share: of the run's steps, in proportion to the other stages'.
        sizes: of samples; what is there twice is drawn twice as often.
    """

    share: float
    sizes: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Stages, one after another.

    Raises:
        ValueError: there is no stage, or one without sizes or with a share of 0 or less.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self):
        if not self.stages or not all(s.share > 0.0 and len(s.sizes) for s in self.stages):
            raise ValueError("Curriculum: every stage needs a share above 0 and sizes")

    def stage(self, step: int, steps: int) -> Stage:
        """Of a step from 0 to ``steps - 1``.

        Raises:
            ValueError: there is no such step.
        """
        check_int("Curriculum", "step", step, 0, steps - 1)
        ends = list(itertools.accumulate(stage.share for stage in self.stages))
        # rounding may put the very last step behind the last end
        place = bisect.bisect_right(ends, step / steps * ends[-1])
        return self.stages[min(place, len(ends) - 1)]

    def size(self, seed: int, step: int, steps: int) -> int:
        """Of the samples of a step."""
        sizes = self.stage(step, steps).sizes
        # numpy's generators may change, their seeds do not; 1 is for no other draw of the step
        (drawn,) = np.random.SeedSequence((seed, step, 1)).generate_state(1, np.uint64)
        return sizes[int(drawn) % len(sizes)]


def curriculum(name: str, sizes: Sequence[int]) -> Curriculum:
    """A schedule by its name.

    - ``"stairs"``: a stage for each size, of equal shares, the smallest first. Half of a stage's
      steps have its own size, the other half one of those before.
    - ``"ramp"``: the largest size grows evenly from the smallest to the last of ``sizes`` over the
      first half of the run. Each step has any size between the smallest and the largest so far,
      those between ``sizes`` as well. From 0 there is no way up: it is a first stage of its own,
      and the next of ``sizes`` is the smallest.
    - ``"mixed"``: all sizes from the first step on.

    With one size all are the same.

    Args:
        name: of the schedule.
        sizes: the number of segments of a context, or of its tokens.

    Raises:
        ValueError: there is no such schedule, or sizes are not ascending.
    """
    if name not in SCHEDULES:
        raise ValueError(f"a curriculum is one of {', '.join(SCHEDULES)}, got {name}")
    sizes = tuple(sizes)
    if not sizes or any(low >= high for low, high in itertools.pairwise(sizes)):
        raise ValueError(f"a curriculum's sizes must ascend, got {' '.join(map(str, sizes))}")
    if name == "mixed" or len(sizes) == 1:
        return Curriculum((Stage(1.0, sizes),))
    if name == "stairs":
        return Curriculum(
            tuple(
                Stage(1.0, sizes[:number] + sizes[number : number + 1] * max(number, 1))
                for number in range(len(sizes))
            )
        )
    # facts alone, which are as long as they are
    alone = [(0,)] if sizes[0] == 0 else []
    low, high = sizes[len(alone)], sizes[-1]
    levels = min(high - low, _LEVELS)
    tops = [low + (high - low) * level // levels for level in range(levels)]
    slope = [*alone, *(range(low, top + 1) for top in tops)]
    stages = [Stage(_RAMP / len(slope), some) for some in slope]
    return Curriculum((*stages, Stage(1.0 - _RAMP, range(low, high + 1))))
