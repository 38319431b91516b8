"""What the CUDA kernels do beside what every backend does: attention of few slots.

In the emulator: which blocks there are, what parts of the tokens add up to, tiles that end early.
"""

import pytest
import torch

from lm2_kernels import testing
from tools.emulated_cuda import emulated_cuda, emulation_reason, launches

pytestmark = pytest.mark.skipif(emulation_reason() is not None, reason=str(emulation_reason()))

DTYPES = ("float32", "bfloat16", "float16")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def _read(batch, tokens, slots, heads, width, **options) -> testing.Case:
    options = tuple(options.items())
    return testing.Case("memory_attention", batch, tokens, slots, heads, width, options)


# the numbers of slots around a group (8), what a product with weights takes (16) and a tile (8, 16
# or 32), each width of tiles with whole vectors and without, every option
FEW_SLOTS = (
    _read(9, 20, 1, 2, 64, causal=False),
    _read(3, 35, 4, 2, 128, causal=False, dropout_p=0.3),
    _read(2, 40, 5, 2, 256, slot_offset=2),
    _read(2, 33, 8, 2, 65, causal=False),
    _read(2, 70, 9, 2, 32, slot_mask="random", causal=False),
    _read(2, 17, 16, 1, 200, slot_offset=5),
    _read(2, 100, 17, 1, 256, slot_mask="prefix"),
    _read(1, 50, 33, 2, 67, causal=False, scale=-0.3),
    _read(2, 9, 64, 1, 128, slot_offset=60, dropout_p=0.3),
    _read(5, 1, 40, 3, 64, slot_offset=30),
)
# few blocks and 512 tokens or more: dK and dV in parts
IN_PARTS = (
    _read(2, 600, 1, 1, 64, causal=False),
    _read(1, 515, 4, 2, 128, causal=False, dropout_p=0.3),
    _read(1, 600, 5, 1, 256, slot_offset=2),
    _read(1, 512, 9, 1, 65, slot_mask="random", causal=False),
    _read(1, 700, 16, 3, 32, slot_mask="prefix", dropout_p=0.5),
    _read(2, 521, 17, 1, 200, slot_offset=17),
    _read(1, 1030, 33, 1, 16, causal=False, scale=-0.3),
    # the last slots are seen by tokens of the last parts alone
    _read(1, 600, 300, 1, 17),
)


@every_dtype
@pytest.mark.parametrize("case", FEW_SLOTS + IN_PARTS, ids=lambda case: case.id)
def test_few_slots_match_oracle(case, dtype):
    with emulated_cuda(case.slots):
        for comparison in testing.check_case(case, testing.DTYPES[dtype], "cpp"):
            assert comparison.passed, comparison


# several tiles of every width, with tokens and slots that end within one
SEVERAL_TILES = (
    _read(1, 70, 150, 2, 64, slot_offset=30),
    _read(1, 70, 150, 1, 128, slot_mask="random"),
    _read(1, 50, 70, 1, 256, dropout_p=0.3),
    _read(1, 70, 100, 1, 67, causal=False),
    # the last slots are seen by no token
    _read(1, 20, 200, 1, 48),
)


@pytest.mark.parametrize(
    ("case", "major"),
    (
        *((case, major) for case in SEVERAL_TILES for major in (7, 8)),
        # of those above
        *((case, 7) for case in FEW_SLOTS[::3]),
    ),
    ids=lambda value: getattr(value, "id", value),
)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_with_and_without_copies_a_step_ahead(case, dtype, major):
    """sm_75 has other tiles than what came later; both in two orders of threads."""
    for seed in range(2):
        with emulated_cuda(seed, major=major):
            for comparison in testing.check_case(case, testing.DTYPES[dtype], "cpp"):
                assert comparison.passed, comparison


def _grids(case: testing.Case, dtype: str, major: int = 8) -> list[tuple[int, int]]:
    inputs = testing.make_inputs(case, testing.DTYPES[dtype])
    with emulated_cuda(major=major), launches() as grids:
        testing.run_case(case, inputs, "cpp")
    return grids


@pytest.mark.parametrize(
    ("rows", "dtype", "width", "blocks", "warps", "major"),
    (
        (1, "bfloat16", 64, 1, 1, 8),
        (16, "bfloat16", 64, 1, 1, 8),
        (17, "bfloat16", 64, 1, 2, 7),
        (64, "bfloat16", 64, 1, 4, 8),
        # evenly
        (65, "bfloat16", 64, 2, 3, 8),
        (130, "bfloat16", 128, 3, 3, 8),
        (33, "bfloat16", 256, 1, 3, 8),
        (33, "bfloat16", 256, 2, 2, 7),
        (33, "float32", 128, 2, 2, 8),
        (33, "float32", 256, 3, 1, 8),
    ),
)
def test_a_block_has_as_many_warps_as_its_rows_need(rows, dtype, width, blocks, warps, major):
    of_tokens = _grids(_read(1, rows, 1, 2, width), dtype, major)
    forward, _, dquery, _ = of_tokens
    assert forward == dquery == (2 * blocks, 32 * warps)
    # dkey and dvalue in one launch, and where registers allow it in one pass
    passes = 1 if dtype == "bfloat16" and width < 256 else 2
    of_slots = _grids(_read(1, 1, rows, 2, width), dtype, major)[-1]
    assert of_slots == (passes * 2 * blocks, 32 * warps)


@pytest.mark.parametrize(
    ("batch", "tokens", "slots", "parts"),
    (
        (1, 511, 16, 1),
        (1, 512, 16, 4),
        (2, 600, 16, 4),
        (1, 2048, 16, 16),
        # of 160 tokens, for tiles begin and end together
        (1, 1100, 128, 7),
        # 4 times 66 blocks of 4 warps are a wave
        pytest.param(66, 512, 64, 4, marks=pytest.mark.slow),
        pytest.param(67, 512, 64, 1, marks=pytest.mark.slow),
    ),
)
def test_parts_fill_a_gpu_and_have_enough_to_do(batch, tokens, slots, parts):
    case = _read(batch, tokens, slots, 1, 8, causal=False)
    grids = _grids(case, "bfloat16")
    blocks, threads = grids[3]
    assert blocks == batch * -(-slots // 64) * parts
    assert blocks * threads // 32 <= 8 * 132
    # the sums
    assert grids[4:] == ([(-(-batch * slots * 2 * 8 // 256), 256)] if parts > 1 else [])


@pytest.mark.parametrize("slot_mask", (None, "random"))
def test_parts_are_added_up_in_order(slot_mask):
    """The same bits as of each part alone, in float32."""
    case = _read(2, 512, 20, 2, 16, causal=False, slot_mask=slot_mask)
    inputs = testing.make_inputs(case, torch.float32)
    sums = {"dkey": 0.0, "dvalue": 0.0}
    with emulated_cuda():
        got = testing.run_case(case, inputs, "cpp")
        for start in range(0, 512, 128):
            tensors = {**inputs.tensors, "query": inputs.tensors["query"][:, start : start + 128]}
            cotangents = (inputs.cotangents[0][:, start : start + 128],)
            part = inputs._replace(tensors=tensors, cotangents=cotangents)
            results = testing.run_case(case._replace(tokens=128), part, "cpp")
            sums = {name: x + results[name] for name, x in sums.items()}
    for name, x in sums.items():
        assert torch.equal(got[name], x), name


@every_dtype
def test_parts_have_the_same_bits_in_any_order_of_blocks(dtype):
    case = _read(1, 520, 18, 2, 24, slot_offset=3, dropout_p=0.2)
    inputs = testing.make_inputs(case, testing.DTYPES[dtype])
    runs = []
    for seed in (0, 5):
        with emulated_cuda(seed):
            runs.append(testing.run_case(case, inputs, "cpp"))
    for name, x in runs[0].items():
        assert torch.equal(x, runs[1][name]), name


def test_what_masked_slots_hold_does_not_matter_in_tiles_that_end_early():
    case = _read(1, 520, 12, 1, 16, causal=False, slot_mask="random")
    inputs = testing.make_inputs(case, torch.float16)
    runs = []
    for poison in (0.0, float("nan")):
        for name in ("key", "value"):
            inputs.tensors[name][~inputs.constants["slot_mask"]] = poison
        with emulated_cuda():
            runs.append(testing.run_case(case, inputs, "cpp"))
    for name, x in runs[0].items():
        assert torch.equal(x, runs[1][name]), name
