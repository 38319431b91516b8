"""The study: fair to all contenders, resumable, and its documents say what its lines say."""

import concurrent.futures
import dataclasses
import importlib
import io
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
study = importlib.import_module("study")
report = importlib.import_module("study_report")

LEARNING = study.block_named("learning")


def _result(cell, right):
    task = study.block_named(cell.block).task
    tests = {} if isinstance(task, study.Text) else task.kinds()
    answers = {name: [right, 1000] for name in tests}
    answers |= {f"{name}, shuffled": [100, 1000] for name in tests}
    protocol = study.block_named(cell.block).protocol()
    known = {"protocol": protocol, "minutes": 1.0, "failure": None, "losses": [0.9, 0.4]}
    known["loss"] = {"held out": 1.5, "held out, shuffled": 2.0}
    return {"cell": dataclasses.asdict(cell), "answers": answers, **known}


def _run_all(contender, right, block=LEARNING):
    """Runs the pilots that are asked for by a function of rate and base. Results by key."""
    results = {}
    while True:
        place, pilots = study.tuned(block, contender, results)
        if place is not None:
            return place, results
        assert pilots
        for cell in pilots:
            assert cell.key not in results and cell.seed in study.PILOTS
            results[cell.key] = _result(cell, right(cell.rate, cell.theta))


@pytest.mark.parametrize("kind", ("rmt", "full", "lm2"))
def test_pilots_find_the_best_of_the_grid(kind):
    best = (2e-3, 10000.0)
    place, results = _run_all(
        study.Contender(kind), lambda rate, theta: 900 if (rate, theta) == best else 300
    )
    assert place == best
    # one seed of each, a second one of two
    assert len(results) == len(study.RATES) * len(study.THETAS) + 2


def test_pilots_go_on_beyond_an_edge_and_stop():
    place, results = _run_all(study.Contender("rmt"), lambda rate, theta: int(1e-1 / rate))
    assert place == (study.LOWEST, min(study.THETAS))
    rates = {json.loads(key)["rate"] for key in results}
    assert min(rates) == study.LOWEST and max(rates) == max(study.RATES)
    # who answers all looks no further
    place, results = _run_all(study.Contender("rmt"), lambda rate, theta: 1000)
    assert place == (min(study.RATES), min(study.THETAS))
    assert {json.loads(key)["rate"] for key in results} == set(study.RATES)


def test_no_memory_is_tuned_where_the_loss_is_compared():
    block = study.block_named("text")
    assert not study.tuned(LEARNING, study.Contender("none"), {})[1]
    pilots = {len(study.tuned(block, contender, {})[1]) for contender in block.contenders}
    assert pilots == {len(study.RATES) * len(study.THETAS)}


def test_pilots_are_asked_other_questions(small):
    asked = {}
    for seed in (0, study.PILOTS[0]):
        test_seeds = []
        real = study.Stories.tests

        def tests(task, test_seed, test_seeds=test_seeds, real=real):
            test_seeds.append(test_seed)
            return real(task, test_seed)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(study.Stories, "tests", tests)
            study.run_cell(study.Cell("learning", study.Contender("none"), 1e-3, seed))
        (asked[seed],) = test_seeds
    assert len(set(asked.values())) == 2
    questions = [
        [batch["input_ids"] for _, _, asked in small.task.tests(seed) for batch in asked]
        for seed in asked.values()
    ]
    assert not torch.equal(questions[0][0], questions[1][0])


def test_lines_of_another_protocol_or_cut_count_for_nothing(small, monkeypatch):
    cell = study.Cell("learning", study.Contender("none"), 1e-3, 0)
    study._append("learning", _result(cell, 200))
    with (study.FOLDER / "learning.jsonl").open("a") as file:
        file.write('{"cell": {"blo')
    assert len(study.load("learning")) == 1
    study._append("learning", _result(dataclasses.replace(cell, seed=1), 200))
    older = _result(dataclasses.replace(cell, seed=2), 200)
    del older["protocol"]
    study._append("learning", older)
    assert len(study.load("learning")) == 2
    monkeypatch.setattr(study, "BLOCKS", (dataclasses.replace(small, steps=3),))
    (study.FOLDER / "learning.jsonl").write_text(json.dumps(_result(cell, 200)) + "\n")
    assert len(study.load("learning")) == 1
    monkeypatch.setattr(study, "BLOCKS", (dataclasses.replace(small, steps=4),))
    assert not study.load("learning")


def test_a_cell_that_fails_leaves_the_others(small, monkeypatch):
    class Pool:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, cell):
            future = concurrent.futures.Future()
            if cell.contender.kind == "rmt":
                future.set_exception(RuntimeError("no room"))
            else:
                future.set_result(_result(cell, 200))
            return future

    monkeypatch.setattr(study.concurrent.futures, "ProcessPoolExecutor", Pool)
    with pytest.raises(RuntimeError, match="no room"):
        study.run([small], 20, 1.0)
    kinds = [result["cell"]["contender"]["kind"] for result in study.load("learning")]
    assert kinds and "rmt" not in kinds


def test_the_second_pilot_decides():
    def right(cell):
        if cell.seed == study.PILOTS[0]:
            return {1e-3: 800, 2e-3: 810}.get(cell.rate, 100) if cell.theta == 10.0 else 100
        return {1e-3: 800, 2e-3: 300}[cell.rate]

    results, contender = {}, study.Contender()
    place = None
    while place is None:
        place, pilots = study.tuned(LEARNING, contender, results)
        results |= {cell.key: _result(cell, right(cell)) for cell in pilots if cell.rate >= 1e-3}
        results |= {cell.key: _result(cell, 100) for cell in pilots if cell.rate < 1e-3}
    assert place == (1e-3, 10.0)


def test_the_plan_ends_and_claims_other_seeds_than_the_pilots():
    block = study.block_named("length")
    results = {}
    for _ in range(100):
        cells = [cell for cell in study.plan([block], results) if cell.key not in results]
        if not cells:
            break
        # a part at a time, as a run that is cut
        for cell in cells[:50]:
            results[cell.key] = _result(cell, 500)
    ran = [json.loads(key) for key in results]
    claimed = [cell for cell in ran if cell["block"] == "length"]
    assert len(claimed) == len(block.contenders) * len(study.SEEDS)
    assert {cell["seed"] for cell in claimed} == set(study.SEEDS)
    pilots = [cell for cell in ran if cell["block"] == "learning"]
    assert {cell["seed"] for cell in pilots} == set(study.PILOTS)


@pytest.mark.parametrize("block", study.BLOCKS, ids=lambda block: block.name)
def test_all_have_as_many_parameters(block):
    counts = {c: study.num_parameters(study.build(c, block.task, 0)) for c in block.contenders}
    narrow = [counts.pop(c) for c in block.contenders if c.kind == "narrow"]
    assert all(number < 0.75 * min(counts.values()) for number in narrow)
    assert max(counts.values()) <= 1.02 * min(counts.values()), counts


def test_text_is_held_out_of_all_its_pieces(monkeypatch, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(1, 101)) * 400)
    monkeypatch.setenv("LM2_STUDY_TEXT", str(path))
    task = study.SpreadText(pieces=40)
    assert task.digest() == study.Text().digest()
    train, held_out = task._parts()
    assert len(train.files) == len(held_out.files) == 40
    for piece, (kept, left) in enumerate(zip(train.files, held_out.files, strict=True)):
        text = path.read_bytes()[1000 * piece : 1000 * (piece + 1)]
        assert bytes(kept) + bytes(left) == text and len(left) == task.longest


def test_batches_are_the_same_for_all_and_of_no_other_seed():
    task = study.block_named("length").task
    first, again, other = (list(task.batches(seed, 9)) for seed in (0, 0, 1))
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one["input_ids"], two["input_ids"])
        assert not torch.equal(one["input_ids"], three["input_ids"])
    lengths = [batch["input_ids"].shape[1] // 24 - 1 for batch in first]
    # the fewest segments for a third of the steps, then each in turn
    assert lengths[:3] == [1, 1, 1] and set(lengths[3:]) == {1, 2}


def test_loss_on_all_is_on_what_is_read_too():
    task, steps = study.Stories(loss="all"), 1
    (batch,), (answers,) = list(task.batches(0, steps)), list(study.Stories().batches(0, steps))
    ids, labels = batch["input_ids"], batch["labels"]
    asked = answers["labels"] != -100
    assert torch.equal(labels[asked], answers["labels"][asked])
    assert torch.equal(labels[~asked & (ids != 0)], ids[~asked & (ids != 0)])
    assert (labels[~asked & (ids == 0)] == -100).all()


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A block of two steps and four questions, whose lines go elsewhere."""
    block = dataclasses.replace(LEARNING, steps=2)
    monkeypatch.setattr(study, "BLOCKS", (block,))
    monkeypatch.setattr(study, "TESTED", 4)
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    return block


@pytest.mark.parametrize("number", (0, 1, 2, 3, 16))
def test_a_cell_is_a_function_of_itself(small, number):
    cell = study.Cell("learning", small.contenders[number], 1e-3, 0)
    results = [study.run_cell(cell) for _ in range(2)]
    for result in results:
        json.dumps(result)
        assert study.cell_of(result) == cell
        for name in ("train_cpu_seconds", "minutes"):
            del result[name]
        assert len(result["answers"]) == (4 if cell.contender.kind == "lm2" else 2)
    assert results[0] == results[1]


def test_a_loss_that_is_not_finite_is_a_result(small, monkeypatch):
    def fails(*_, **__):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(study, "train", fails)
    result = study.run_cell(study.Cell("learning", small.contenders[3], 1e-3, 0))
    assert result["failure"] == "the loss is nan"


def test_tasks_fill_their_segments(small, monkeypatch):
    block = dataclasses.replace(study.block_named("learning"), name="qa1")
    block = dataclasses.replace(block, task=study.Told("qa1", (1, 2), (1, 3), rows=4), steps=6)
    monkeypatch.setattr(study, "BLOCKS", (block,))
    task = block.task
    first, again = (list(task.batches(0, 6)) for _ in range(2))
    assert [batch["input_ids"].shape for batch in first] == [
        (4, 64 * (segments + 1)) for segments in (1, 1, 1, 2, 1, 2)
    ]
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one["input_ids"], two["input_ids"])
        # an answer each, in the last segment
        assert ((one["labels"] != -100).sum(1) == 1).all()
        assert (one["labels"][:, :-64] == -100).all()
    assert [(name, known) for name, known, _ in task.tests(0)] == [
        ("1 segments", True),
        ("3 segments", False),
    ]
    result = study.run_cell(study.Cell("qa1", study.Contender(), 1e-3, 0))
    assert list(result["answers"]) == ["1 segments", "1 segments, shuffled", "3 segments"]
    assert result["answers"]["3 segments"][1] == study.TESTED


def test_text_is_held_out(small, monkeypatch, tmp_path, capsys):
    block = dataclasses.replace(
        study.block_named("learning"), name="text", task=study.Text(), steps=2, measure="loss"
    )
    monkeypatch.setattr(study, "BLOCKS", (block,))
    monkeypatch.setattr(study, "TESTED", 16)
    cell = study.Cell("text", study.Contender(), 1e-3, 0)
    monkeypatch.delenv("LM2_STUDY_TEXT", raising=False)
    study.run([block], 1, 0.0)
    assert "left out: the block text" in capsys.readouterr().out
    text = tmp_path / "text"
    # all but the last twentieth is seen in training; pilots are asked its first half
    text.write_text("a" * 19000 + "c" * 500 + "b" * 500)
    monkeypatch.setenv("LM2_STUDY_TEXT", str(text))
    seen = torch.cat([batch["input_ids"] for batch in block.task.batches(0, 4)])
    assert set(seen.unique().tolist()) == {ord("a")}
    for seed, byte in ((study._TEST_SEED, "b"), (study._PILOT_SEED, "c")):
        ((_, _, held_out),) = block.task.tests(seed)
        assert set(torch.cat([b["input_ids"] for b in held_out]).unique().tolist()) == {ord(byte)}
    result = study.run_cell(cell)
    assert set(result["loss"]) == {"held out", "held out, shuffled"}
    assert study.score(result) == -result["loss"]["held out"]
    # lines of one text are not gone on with on another
    _write_lines([result])
    study.run([block], 1, 0.0)
    text.write_text("a" * 20000)
    with pytest.raises(SystemExit, match="another text"):
        study.run([block], 1, 0.0)


def test_all_resamples_of_a_few():
    assert report.bootstrap([0.3] * 5) == pytest.approx((0.3, 0.3))
    # binomial of 5 and 1/5: at most 2 with 0.942, at most 3 with 0.993
    assert report.bootstrap([0.0, 0.0, 0.0, 0.0, 1.0]) == pytest.approx((0.0, 0.6))


def _write_lines(results):
    for result in results:
        path = study.FOLDER / f"{result['cell']['block']}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def test_when_the_plateau_is_left():
    early, late, never = [2.0, 0.9, 0.3], [2.0, 0.9, 0.9, 0.46, 0.44], [1.0, 0.5]
    runs = {seed: {"losses": losses} for seed, losses in enumerate((late, early))}
    assert report.left_after(runs) == "300 to 500"
    assert report.left_after({0: {"losses": early}}) == "300"
    assert report.left_after({0: {"losses": never}, 1: {"losses": []}}) == "never"
    assert report.left_after(runs | {2: {"losses": never}}) == "300 to never"


def test_tables_say_what_the_lines_say(small):
    contenders = (study.Contender("none"), study.Contender())
    for contender, right in zip(contenders, (200, 900), strict=True):
        (rate, theta), pilots = _run_all(contender, lambda rate, theta, right=right: right)
        cells = [study.Cell("learning", contender, rate, seed, theta) for seed in study.SEEDS]
        # the last seed did not escape
        results = [_result(cell, 200 if cell.seed == 4 else right) for cell in cells]
        _write_lines([*pilots.values(), *results])
    _, _, none, memory = report.table("learning").splitlines()
    assert "| 20 (20 to 20) | 20 (20 to 20) |  | 0 of 5 |" in none
    assert "| 76 (48 to 90) | 76 (48 to 90) | 10 (10 to 10) | 4 of 5 |" in memory
    *_, line = report.table("learning_differences").splitlines()
    assert line.endswith("| +56 (+28 to +70) | +66 (+38 to +80) |")


def test_the_page_has_the_tables_of_the_committed_lines():
    text = (ROOT / "docs" / "study.md").read_text("utf-8")
    assert text == report.rewritten(text)
    shown = re.findall(r"<!-- study: (\w+) -->", text)
    assert len(shown) == text.count("<!-- study:") == len(set(shown))
    # of what has been run
    assert set(shown) == {n for n in report.TABLES if len(report.table(n).splitlines()) > 2}


def test_pictures_are_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for name, (block, _) in report.FIGURES.items():
        # as if all had been run
        results = {}
        while cells := [c for c in study.plan([study.block_named(block)], results)]:
            cells = [cell for cell in cells if cell.key not in results]
            if not cells:
                break
            results |= {cell.key: _result(cell, 500) for cell in cells}
        _write_lines(results.values())
        written = io.StringIO()
        # letters as letters, not as outlines
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            report.draw(name, written)
        shown = set(re.findall(r">([^<>]+)<", written.getvalue()))
        for contender in study.block_named(block).contenders:
            is_variant = contender.start != "plain" or contender.write.startswith("query")
            assert (contender.name in shown) != is_variant, contender.name


def test_every_table_of_a_whole_study(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    results = {}
    while cells := [c for c in study.plan(list(study.BLOCKS), results) if c.key not in results]:
        results |= {cell.key: _result(cell, 500) for cell in cells}
    _write_lines(results.values())
    for name, (block, _) in report.TABLES.items():
        head, rule, *rows = report.table(name).splitlines()
        assert rule == "|" + "---|" * (head.count("|") - 1)
        assert all(row.count("|") == head.count("|") for row in rows)
        if block is None:
            continue
        named = {row.split(" | ")[0].removeprefix("| ") for row in rows}
        contenders = study.block_named(block).contenders
        if name.endswith("_differences"):
            contenders = [contender for contender in contenders if contender.kind == "lm2"]
        assert name == "costs" or named == {contender.name for contender in contenders}, name


def test_the_table_of_text(small, monkeypatch):
    contenders = (study.Contender("none"), study.Contender())
    block = dataclasses.replace(study.block_named("learning"), name="text", measure="loss")
    block = dataclasses.replace(block, task=study.Text(), contenders=contenders)
    monkeypatch.setattr(study, "BLOCKS", (block,))

    def line(cell, loss):
        losses = {"held out": loss, "held out, shuffled": 2.0}
        known = {"failure": None, "protocol": block.protocol()}
        return {"cell": dataclasses.asdict(cell), "loss": losses, **known}

    for contender, loss in zip(contenders, (1.5, 1.25), strict=True):
        cells, results = [], {}
        while not cells:
            place, pilots = study.tuned(block, contender, results)
            results |= {cell.key: line(cell, loss) for cell in pilots}
            if place is not None:
                rate, theta = place
                cells = [study.Cell("text", contender, rate, s, theta) for s in study.SEEDS]
        _write_lines([*results.values(), *(line(cell, loss) for cell in cells)])
    _, _, none, memory = report.text_table(block).splitlines()
    assert none.endswith("| 1.5000 |  |  |")
    assert memory.endswith("| 1.2500 | -0.2500 (-0.2500 to -0.2500) | 2.0000 |")


def test_the_table_of_the_real_model(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    assert len(report.table("real").splitlines()) == 2
    plain = {"last window": [3, 12], "one window": [12, 12], "last window, any word": [0, 12]}
    lines = [{"cell": "plain", "answers": {"qa1 32": plain}}]
    for seed, right in enumerate((6, 9, 12)):
        # a run that is cut is in no table
        (tmp_path / "real.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        assert len(report.table("real").splitlines()) == 2
        answers = {"memory": [right, 12], "another's": [3, 12]}
        lines.append({"cell": seed, "answers": {"qa1 32": answers}})
    (tmp_path / "real.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    *_, row = report.table("real").splitlines()
    assert row == "| qa1 | 32 | 25 | 100 | 75 (50 to 100) | 25 (25 to 25) |"


def test_the_table_of_the_real_models_candidates(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    for name, scale, seeds in (("real", 1.0, 3), ("real_read", 2.0, 3), ("real_read_low", 3.0, 1)):
        lines = [
            {"cell": seed, "losses": {"place 0": [scale * (seed + step) for step in range(11)]}}
            for seed in range(seeds)
        ]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    *_, token, read, low = report.table("real_candidates").splitlines()
    assert token.startswith("| token | 0.002 | 3 | 2.00 to 4.00 | 4.00 to 6.00 |")
    assert read.endswith("| 20.00 to 24.00 |")
    assert low.startswith("| read | 0.0005 | 1 | 6.00 |")


def test_costs(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    contenders = (study.Contender("none"), study.Contender())
    block = dataclasses.replace(study.block_named("length"), contenders=contenders, steps=5)
    monkeypatch.setattr(study, "BLOCKS", (block,))
    found = study.costs()
    assert found["batch"] == [32, 72]
    plain, memory = found["contenders"].values()
    assert plain["ratio"] == 1.0
    assert min(memory["kept_bytes"], plain["kept_bytes"]) > 0
    (tmp_path / "costs.json").write_text(json.dumps(found))
    *_, line = report.table("costs").splitlines()
    assert f"{memory['parameters']:,}" in line and f"{memory['ratio']:.2f}" in line


def test_a_row_without_all_seeds_is_left_out(small):
    contender = study.Contender("none")
    cells = [study.Cell("learning", contender, 1e-3, seed) for seed in (0, 1, 2, 3)]
    _write_lines(_result(cell, 200) for cell in cells)
    assert len(report.table("learning").splitlines()) == 2


@pytest.mark.parametrize("name", [block.name for block in study.BLOCKS])
def test_committed_lines_are_cells_that_there_are(name):
    block, results = study.block_named(name), study.load(name)
    cells = [study.cell_of(result) for result in results]
    assert len({cell.key for cell in cells}) == len(cells)
    for result, cell in zip(results, cells, strict=True):
        assert cell.block == name and cell.contender in block.contenders
        assert {"torch", "commit", "capability"} <= set(result["machine"])
        measured = result[block.measure]
        if block.measure == "answers":
            assert set(block.task.kinds()) <= set(measured)
            measured = dict(enumerate(itertools.chain.from_iterable(measured.values())))
        assert all(0 <= count <= study.TESTED for count in measured.values())
