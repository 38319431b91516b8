"""Which sizes a run's steps have, by the name of its schedule."""

import collections

import pytest

from lm2_kernels.training.curriculum import SCHEDULES, Curriculum, Stage, curriculum


def _sizes(name, sizes, steps, seed=3):
    schedule = curriculum(name, sizes)
    return [schedule.size(seed, step, steps) for step in range(steps)]


def test_stairs_take_one_size_after_another():
    """The new one in half of the steps, and those before still."""
    drawn = _sizes("stairs", (1, 2, 4), 1200)
    thirds = [collections.Counter(drawn[i : i + 400]) for i in range(0, 1200, 400)]
    assert [set(third) for third in thirds] == [{1}, {1, 2}, {1, 2, 4}]
    schedule = curriculum("stairs", (1, 2, 4))
    assert [sorted(stage.sizes) for stage in schedule.stages] == [[1], [1, 2], [1, 2, 4, 4]]
    borders = [schedule.stage(step, 1200) for step in (399, 400, 799, 800)]
    assert borders == [schedule.stages[number] for number in (0, 1, 1, 2)]


def test_a_ramp_grows_evenly():
    schedule = curriculum("ramp", (1, 3, 5))
    tops = [max(schedule.stage(step, 80).sizes) for step in range(80)]
    assert tops == [1] * 10 + [2] * 10 + [3] * 10 + [4] * 10 + [5] * 40
    assert all(min(schedule.stage(step, 80).sizes) == 1 for step in range(80))
    assert set(_sizes("ramp", (1, 3, 5), 400)) == {1, 2, 3, 4, 5}
    # in tokens too
    long = curriculum("ramp", (1000, 100_000))
    assert len(long.stages) == 65
    assert max(long.stage(0, 10).sizes) == 1000 and max(long.stage(9, 10).sizes) == 100_000


def test_a_ramp_begins_with_facts_alone():
    """Which are of no length that could grow: the next size is where it begins."""
    schedule = curriculum("ramp", (0, 4, 7))
    stages = [schedule.stage(step, 80).sizes for step in (0, 9, 10, 20, 30, 39, 40)]
    assert list(map(tuple, stages)) == [(0,), (0,), (4,), (4, 5), *[(4, 5, 6)] * 2, (4, 5, 6, 7)]
    assert _sizes("ramp", (0, 5), 4) == [0, 0, 5, 5]


def test_mixed_has_all_from_the_start():
    drawn = _sizes("mixed", (0, 7, 9), 60)
    assert set(drawn[:30]) == set(drawn[30:]) == {0, 7, 9}


def test_every_step_has_a_stage():
    """Whatever the shares sum to, and with fewer steps than stages."""
    thirds = Curriculum(tuple(Stage(0.1, (size,)) for size in range(3)))
    assert [thirds.size(0, step, 3) for step in range(3)] == [0, 1, 2]
    for name in SCHEDULES:
        for steps in (1, 2, 7):
            assert len(_sizes(name, (1, 2, 3, 4, 5), steps)) == steps
        assert set(_sizes(name, (6,), 5)) == {6}


def test_a_size_is_a_function_of_seed_and_step():
    """The same numbers on every platform."""
    assert _sizes("mixed", (1, 2, 3), 12, seed=0) == [2, 1, 3, 3, 1, 2, 2, 3, 1, 1, 1, 2]
    assert _sizes("mixed", (1, 2, 3), 40, seed=0) != _sizes("mixed", (1, 2, 3), 40, seed=1)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    (
        ("steep", (1,), "one of stairs, ramp, mixed, got steep"),
        ("stairs", (), "must ascend"),
        ("stairs", (2, 1), "must ascend, got 2 1"),
        ("mixed", (2, 2), "must ascend"),
    ),
)
def test_what_is_no_curriculum(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        curriculum(name, sizes)
    for stages in ((), (Stage(0.0, (1,)),), (Stage(1.0, ()),)):
        with pytest.raises(ValueError, match="needs a share"):
            Curriculum(stages)
    with pytest.raises(ValueError, match="step"):
        curriculum("mixed", (1,)).size(0, 4, 4)
