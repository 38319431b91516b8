"""Attention by descriptors and by specialised warps, which are nobody's default yet."""

import pytest
import torch
import triton

import lm2_kernels as lm2
from lm2_kernels import testing
from lm2_kernels.backends.triton import tables
from tools import forms, launches
from tools.fake_gpu import ptxas_log
from tools.rounding import assert_rule


def _candidates(table) -> list:
    """All that this release compiles; every day the first of each form, of 256 columns where there
    are many slots.
    """
    params, begun = [], set()
    for (kernel, width), several in table.items():
        for index, (config, *_) in enumerate(c for c in several if c.is_for(triton.__version__)):
            is_everyday = width == 256 or config.keeps_slots
            is_everyday &= (kernel, width, config.form) not in begun
            marks = () if is_everyday else pytest.mark.slow
            begun.add((kernel, width, config.form))
            name = f"{kernel}-{width}-{index}-{config.form}"
            params.append(pytest.param(kernel, width, config, id=name, marks=marks))
    return params


CANDIDATES, CANDIDATES_FEW = _candidates(tables.CANDIDATES), _candidates(tables.CANDIDATES_FEW)


def _read(batch, tokens, slots, heads, width, **options) -> testing.Case:
    options = tuple(options.items())
    return testing.Case("memory_attention", batch, tokens, slots, heads, width, options)


_NAMES = {"forward": "fwd", "dkey_value": "bwd_dkey_value", "dquery": "bwd_dquery"}
# rows and slots beyond the last tile, several batches and heads, and widths that a tile pads
CASES = (
    _read(2, 33, 45, 2, 16),
    _read(2, 65, 40, 3, 48),
    _read(3, 37, 70, 1, 16, slot_offset=5),
    _read(2, 20, 50, 2, 16, slot_offset=45),
    _read(2, 33, 45, 2, 32, causal=False),
    _read(1, 1, 50, 2, 16, slot_offset=49),
    _read(2, 40, 45, 2, 16, scale=-0.3),
)
DROPPED = _read(2, 33, 45, 2, 16, dropout_p=0.5)


@pytest.mark.parametrize(
    ("form", "dtype"),
    (
        ("descriptors", torch.bfloat16),
        ("descriptors", torch.float16),
        # to the interpreter it is the same with other tiles
        ("specialized", torch.float16),
    ),
    ids=str,
)
@pytest.mark.parametrize("case", (*CASES, DROPPED), ids=lambda case: case.id)
def test_form_matches_oracle(case, dtype, form):
    chosen = forms.small(form)
    with launches.interpreted("sm_90"), forms.measured(*chosen) as ran:
        assert_rule(lambda seed: testing.check_case(case, dtype, "triton", seed=seed))
    wanted = {config for _, _, config in chosen}
    if form == "specialized" and "dropout_p" in dict(case.options):
        # forward alone has registers for that
        wanted = {*ran.configs} - {c for c in ran.configs if c.form == "pointers"}
        assert wanted == {chosen[0][2]} and len(ran.described) % 3 == 0
    else:
        # query, key, value; twice with dout
        assert {*ran.configs} == wanted and len(ran.described) % 11 == 0
    assert ran.described


@pytest.mark.parametrize(("kernel", "width", "config"), CANDIDATES)
def test_candidate_matches_oracle(kernel, width, config):
    """Each as it is, at its own width."""
    case = _read(1, 150, 140, 1, width, slot_offset=3)
    with launches.interpreted("sm_90"), forms.measured((kernel, width, config)) as ran:
        assert_rule(lambda seed: testing.check_case(case, torch.float16, "triton", seed=seed))
    assert config in ran.configs and ran.described


@pytest.mark.parametrize("form", tables.FORMS[1:])
def test_form_gives_the_same_bits_in_any_order_of_programs(form):
    inputs = testing.make_inputs(CASES[1], torch.float16)
    results = []
    for shuffle in (0, 1):
        chosen = forms.measured(*forms.small(form), wave=12)
        with launches.interpreted("sm_90", shuffle=shuffle), chosen:
            results.append(testing.run_case(CASES[1], inputs, "triton"))
    first, second = results
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "dropout", (False, pytest.param(True, marks=pytest.mark.slow)), ids=("", "dropout")
)
@pytest.mark.parametrize(("kernel", "width", "config"), CANDIDATES)
def test_candidate_compiles(kernel, width, config, dropout):
    """No spills, products of whole warp groups that do not wait for one another, tiles by TMA."""
    options = {"dropout_p": 0.1} if dropout else {}
    case = _read(1, 512, 512, 2, width, **options)
    with launches.compiled("sm_90") as gpu, forms.measured((kernel, width, config)):
        testing.run_case(case, testing.make_inputs(case, torch.bfloat16), "triton")
    (found,) = (each for each in gpu.launches if f"attention_{_NAMES[kernel]}_" in each.kernel)
    if dropout and config.form == "specialized" and kernel != "forward":
        assert found.signature["key_ptr"] == "*bf16"
        return
    assert found.signature["key_ptr"].startswith("tensordesc<bf16[1, 1, ")
    assert found.tensor_cores == {"wgmma.mma_async"}
    assert found.async_copies
    assert found.num_warps == (12 if config.form == "specialized" else config.num_warps)
    assert "serialized" not in ptxas_log(found.warpgroup_ptx, "sm_90a"), found


def _expanded(tensor):
    return tensor[:1].expand_as(tensor)


def _off_by_an_element(tensor):
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return flat.view_as(tensor).copy_(tensor)


def _odd_rows(tensor):
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1, dtype=tensor.dtype)
    wide[..., :-1] = tensor
    return wide[..., :-1]


def _heads_first(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _part_of_more(tensor):
    """As the query of packed projections lies."""
    return torch.stack((tensor, tensor), 2)[:, :, 1]


@pytest.mark.parametrize(
    ("layout", "is_served"),
    (
        (_heads_first, True),
        (_part_of_more, True),
        (_expanded, False),
        (_off_by_an_element, False),
        (_odd_rows, False),
    ),
)
@pytest.mark.parametrize("name", ("query", "key", "value"))
def test_layouts(name, layout, is_served):
    """What the copy engine cannot read goes by pointers, and all of it to the right place."""
    case = CASES[0]

    def run(seed):
        inputs = testing.make_inputs(case, torch.float16, seed=seed)
        tensors = {**inputs.tensors, name: layout(inputs.tensors[name])}
        laid_out = inputs._replace(tensors=tensors)
        return testing.compare_case(case, laid_out, testing.run_case(case, laid_out, "triton"))

    with launches.interpreted("sm_90"), forms.measured(*forms.small("descriptors")) as ran:
        assert_rule(run)
    assert bool(ran.described) == is_served


@pytest.mark.parametrize(
    ("case", "dtype"),
    (
        # a masked slot must not be read
        (_read(2, 33, 45, 2, 16, slot_mask="random"), torch.float16),
        (CASES[0], torch.float32),
        # rows of 34 bytes
        (_read(2, 33, 45, 2, 17), torch.float16),
        # slots that would leave most of a tile empty
        (_read(2, 33, 31, 2, 16), torch.float16),
    ),
    ids=("mask", "float32", "ragged", "few slots"),
)
def test_what_no_descriptor_can_serve_goes_by_pointers(case, dtype):
    with launches.interpreted("sm_90"), forms.measured(*forms.small("descriptors")) as ran:
        assert_rule(lambda seed: testing.check_case(case, dtype, "triton", seed=seed))
    assert ran.configs and not ran.described


def test_parts_of_the_tokens_by_descriptors():
    case = _read(1, 600, 40, 1, 16, causal=False)
    chosen = forms.small("descriptors", slots=16)
    with launches.grids("sm_90") as grids, forms.measured(*chosen, wave=132):
        testing.run_case(case, testing.make_inputs(case, torch.float16), "triton")
    # three blocks of slots, four parts of the tokens
    assert grids[-1] == (12,)
    with launches.interpreted("sm_90"), forms.measured(*chosen, wave=132) as ran:
        assert_rule(lambda seed: testing.check_case(case, torch.float16, "triton", seed=seed))
    assert ran.described


def test_too_few_programs_take_other_tiles():
    config = tables.CANDIDATES["forward", 256][0].config
    for tokens, is_taken in ((128 * 66, True), (128 * 65, False)):
        case = _read(1, tokens, 64, 2, 256)
        with launches.grids("sm_90"), forms.measured(("forward", 256, config), wave=132) as ran:
            inputs = testing.make_inputs(case, torch.float16)
            with torch.no_grad():
                lm2.memory_attention(**inputs.tensors, backend="triton")
        assert (config in ran.configs) == is_taken


def test_later_launches_describe_new_tensors():
    case = CASES[1]
    with launches.checked("sm_90") as gpu, forms.measured(*forms.small("descriptors")):
        for seed in (0, 1):
            inputs = testing.make_inputs(case, torch.float16, seed=seed)
            results = testing.run_case(case, inputs, "triton", seed=seed)
    assert gpu.launches == 2 * gpu.launches[: len(gpu.launches) // 2]
    for comparison in testing.compare_case(case, inputs, results, seed=1):
        assert comparison.passed, comparison


# --- few slots, all of which a program keeps ------------------------------------------------------

FEW_CASES = (
    _read(2, 70, 45, 2, 16),
    _read(2, 130, 64, 3, 48),
    _read(3, 37, 20, 1, 16, slot_offset=5),
    _read(2, 20, 50, 2, 16, slot_offset=45),
    _read(2, 100, 45, 2, 32, causal=False),
    _read(1, 1, 50, 2, 16, slot_offset=49),
    _read(2, 40, 45, 2, 16, scale=-0.3),
    _read(2, 70, 30, 2, 16, dropout_p=0.5),
    _read(2, 70, 45, 2, 16, slot_mask="random"),
    # rows that see nothing
    _read(2, 70, 45, 2, 16, slot_mask="prefix"),
    _read(2, 70, 7, 2, 16, slot_mask="prefix", causal=False),
)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", FEW_CASES, ids=lambda case: case.id)
def test_few_slots_match_oracle(case, dtype):
    # a part of the tokens a program, some of which end within a tile
    chosen = forms.small("resident")
    with launches.interpreted("sm_90"), forms.measured(*chosen, wave=8) as ran:
        assert_rule(lambda seed: testing.check_case(case, dtype, "triton", seed=seed))
    assert [config.form for config in ran.configs[:3]] == ["resident", "resident", "pointers"]
    assert not ran.described


@pytest.mark.parametrize("options", ({}, {"dropout_p": 0.4}), ids=str)
def test_kept_slots_that_are_masked_are_not_read(options):
    case = _read(2, 70, 20, 2, 16, slot_mask="random", slot_offset=8, **options)
    inputs = testing.make_inputs(case, torch.float16)
    runs = []
    for poison in (0.0, float("nan")):
        for name in ("key", "value"):
            inputs.tensors[name][~inputs.constants["slot_mask"]] = poison
        with launches.interpreted("sm_90"), forms.measured(*forms.small("resident"), wave=8) as ran:
            runs.append(testing.run_case(case, inputs, "triton"))
        assert "resident" in {config.form for config in ran.configs}
    for name, result in runs[0].items():
        assert torch.equal(result, runs[1][name]), name


def test_later_launches_are_told_of_their_slots():
    with launches.checked("sm_90"), forms.measured(*forms.small("resident"), wave=8):
        for offset in (3, 0, 9):
            case = _read(2, 70, 45, 2, 16, slot_offset=offset)
            assert_rule(
                lambda seed, case=case: testing.check_case(case, torch.float16, "triton", seed=seed)
            )


@pytest.mark.parametrize(("kernel", "width", "config"), CANDIDATES_FEW)
def test_candidate_for_few_slots_matches_oracle(kernel, width, config):
    case = _read(1, 150, config.block_slots - 5, 1, width, slot_offset=3)
    with launches.interpreted("sm_90"), forms.measured((kernel, width, config), wave=3) as ran:
        assert_rule(lambda seed: testing.check_case(case, torch.float16, "triton", seed=seed))
    assert config in ran.configs


@pytest.mark.parametrize(
    "options",
    (
        {},
        pytest.param({"slot_mask": "prefix"}, marks=pytest.mark.slow),
        pytest.param({"dropout_p": 0.1, "causal": False}, marks=pytest.mark.slow),
        pytest.param({"slot_mask": "prefix", "dropout_p": 0.1}, marks=pytest.mark.slow),
    ),
    ids=str,
)
@pytest.mark.parametrize(
    "share", (1, *(pytest.param(share, marks=pytest.mark.slow) for share in (2, 4, 8, 16)))
)
@pytest.mark.parametrize(("kernel", "width", "config"), CANDIDATES_FEW)
def test_candidate_for_few_slots_compiles(kernel, width, config, share, options):
    """No spills; slots that are in shared memory before the loop, queries that come meanwhile."""
    slots = config.block_slots // share
    narrower = width - 16 if len(options) == 2 else width
    case = _read(1, 512, slots, 2, narrower, **options)
    with launches.compiled("sm_90") as gpu, forms.measured((kernel, width, config)):
        testing.run_case(case, testing.make_inputs(case, torch.bfloat16), "triton")
        name = f"few_slots_{_NAMES[kernel]}_kernel"
        found = gpu.launches[:] = [each for each in gpu.launches if each.kernel == name]
    if "dropout_p" in options and share == 1:
        # random numbers take the registers of half of the slots
        assert not found
        return
    (found,) = found
    assert found.tensor_cores == {"wgmma.mma_async"}
    assert found.async_copies and found.num_warps == config.num_warps
    assert "serialized" not in ptxas_log(found.warpgroup_ptx, "sm_90a"), found


@pytest.mark.parametrize(
    ("case", "dtype", "is_kept"),
    (
        (_read(1, 33, 64, 2, 16), torch.float16, True),
        (_read(1, 33, 65, 2, 16), torch.float16, False),
        (_read(1, 33, 32, 2, 16, dropout_p=0.5), torch.float16, True),
        (_read(1, 33, 33, 2, 16, dropout_p=0.5), torch.float16, False),
        (_read(1, 33, 20, 2, 16), torch.float32, False),
        # rows of 34 bytes
        (_read(1, 33, 20, 2, 17), torch.float16, False),
    ),
)
def test_how_many_slots_are_kept(case, dtype, is_kept):
    with launches.grids("sm_90"), forms.measured(*forms.small("resident")) as ran:
        testing.run_case(case, testing.make_inputs(case, dtype), "triton")
    assert ("resident" in {config.form for config in ran.configs}) == is_kept


@pytest.mark.parametrize(
    ("batch", "tokens", "parts"),
    # whole blocks of 32 tokens: as many programs as multiprocessors, or waves that are nearly full
    ((1, 4096, 64), (2, 1000, 32), (66, 4096, 1), (67, 4096, 8), (132, 64, 1), (1, 5, 1)),
)
def test_parts_of_the_tokens(batch, tokens, parts):
    case = _read(batch, tokens, 8, 2, 16)
    with launches.grids("sm_90") as grids, forms.measured(*forms.small("resident"), wave=132):
        inputs = testing.make_inputs(case, torch.float16)
        with torch.no_grad():
            lm2.memory_attention(**inputs.tensors, backend="triton")
    assert grids == [(2 * batch * parts,)]


def test_parts_of_the_tokens_fill_a_gpu():
    """Whatever the number of heads: little is waited for at the end of the last wave."""
    wave, blocks = tables._ONE_WAVE, 64
    for pairs in range(16, 400):
        for warps in (8, 4):
            config = tables.AttentionConfig(64, 64, warps, 3, "resident")
            run = tables.attention_run(config, pairs, blocks * 64)
            # programs of four warps run two at a time
            at_once = wave * 8 // warps
            waves = -(-pairs * -(-blocks * 64 // run) // at_once)
            assert pairs * blocks >= 0.8 * at_once * waves * (run // 64), pairs


def test_nothing_is_chosen_that_no_hardware_has_run():
    assert not tables.MEASURED and not tables.MEASURED_FEW


@pytest.mark.parametrize(("slots", "is_kept"), ((15, False), (16, True), (64, True), (65, False)))
def test_from_how_many_slots_on_they_are_kept(slots, is_kept, monkeypatch):
    few = tables.Few(tables.CANDIDATES_FEW["forward", 256][0].config, least_slots=16)
    monkeypatch.setitem(tables.MEASURED_FEW, ("forward", "sm_90", 256), few)
    sizes = (64, 2048, slots)
    args = ("sm_90", torch.bfloat16, 256, False, *sizes, False, False, False)
    assert tables.attention_forward(*args).keeps_slots == is_kept


def test_what_may_be_chosen():
    """Each form by a kernel that it has."""
    for (kernel, _), several in tables.CANDIDATES_FEW.items():
        assert kernel in ("forward", "dquery") and all(c.config.keeps_slots for c in several)
    assert not any(c.config.keeps_slots for found in tables.CANDIDATES.values() for c in found)
    for (kernel, _, width), few in tables.MEASURED_FEW.items():
        assert (kernel, width) in tables.CANDIDATES_FEW and few.config.keeps_slots
        assert 1 <= few.least_slots <= few.config.block_slots
