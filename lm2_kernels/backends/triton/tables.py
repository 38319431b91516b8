"""Launch configurations: one plain table, each entry with its reason. No autotuning.

Autotuning would launch untested configurations, differ from run to run, and break CUDA graph
capture. Every entry here is compiled ahead of time by the test suite for each of its targets, and
must not spill beyond what the entry says.

Targets (see ``launch.target``): sm_80, sm_90, sm_100, "small" (at most 100 KB of shared memory a
block: sm_86, sm_89, sm_120), gfx942.
"""

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Tile sizes and resources of one launch."""

    block_rows: int
    block_cols: int
    num_warps: int
    num_stages: int = 1


# --- attention ---------------------------------------------------------------------------------

# wider heads do not fit into registers, and take the composite path
MAX_HEAD_WIDTH = 256


class AttentionConfig(NamedTuple):
    """Tile sizes and resources of one attention launch."""

    block_tokens: int
    block_slots: int
    num_warps: int
    num_stages: int
    form: str = "pointers"

    @property
    def by_descriptors(self) -> bool:
        """Whether the copy engine loads tiles."""
        return self.form in ("descriptors", "specialized")

    @property
    def keeps_slots(self) -> bool:
        """Whether a program keeps all slots, and runs over tokens."""
        return self.form == "resident"


# How the tiles of queries, keys, values and dout get from memory: a row at a time by the addresses
# of its elements; or whole, by the copy engine of sm_90 (TMA), which is given a descriptor, needs
# no registers for addresses and fills what is not there with zeros; or so, but asked for by warps
# of their own, so that loads, products and softmax overlap (the compiler makes 12 warps of 4). Or,
# for few slots, by addresses, while a program keeps all slots and runs over tokens: ``block_slots``
# is the most that it can keep.
FORMS = ("pointers", "descriptors", "specialized", "resident")


_Attention = dict[str, dict[int, AttentionConfig]]  # by target and padded head width

# 16-bit dtypes: the largest tiles that compile without a spill, with and without slot mask and
# dropout. On sm_90 every side that wgmma calls M has 64 rows or more. In brackets: registers
# without and with mask and dropout, kilobytes of shared memory.
FORWARD_16BIT: _Attention = {
    "sm_80": {
        64: AttentionConfig(128, 128, 8, 2),  # (230, 254, 48)
        128: AttentionConfig(128, 64, 8, 3),  # (207, 254, 96)
        256: AttentionConfig(64, 64, 8, 2),  # (183, 255, 104)
    },
    "sm_90": {
        64: AttentionConfig(128, 128, 8, 2),  # (172, 254, 80)
        128: AttentionConfig(128, 64, 8, 3),  # (173, 218, 128)
        256: AttentionConfig(128, 32, 8, 2),  # (246, 254, 128)
    },
    "sm_100": {
        64: AttentionConfig(128, 64, 8, 3),  # (128, 187, 65)
        128: AttentionConfig(128, 64, 8, 3),  # (173, 198, 129)
        256: AttentionConfig(128, 32, 8, 2),  # (246, 251, 129)
    },
    "small": {
        64: AttentionConfig(128, 64, 8, 2),  # sm_89: (167, 190, 32)
        128: AttentionConfig(64, 64, 8, 2),  # sm_89: (128, 178, 56)
        256: AttentionConfig(64, 32, 8, 2),  # sm_89: (181, 230, 68)
    },
    "gfx942": {
        64: AttentionConfig(128, 64, 8, 2),  # (175, 183, 32)
        128: AttentionConfig(128, 32, 8, 2),  # (170, 190, 32), 64 slots spill 13 words
        256: AttentionConfig(64, 32, 4, 2),  # (279, 287, 36)
    },
}
# where 128 rows a program would leave multiprocessors without work
FORWARD_16BIT_FEW: dict[int, AttentionConfig] = {
    64: AttentionConfig(64, 64, 8, 2),  # (165, 188, 41) at most
    128: AttentionConfig(64, 64, 8, 2),  # (164, 183, 81) at most
    256: AttentionConfig(64, 64, 8, 2),  # (194, 255, 161) at most
}
DKEY_VALUE_16BIT: _Attention = {
    "sm_80": {
        64: AttentionConfig(32, 128, 8, 2),  # (180, 178, 40)
        128: AttentionConfig(64, 64, 8, 2),  # (176, 186, 73)
        256: AttentionConfig(32, 64, 8, 3),  # (251, 255, 133), 8 words with dropout on triton 3.6
    },
    "sm_90": {
        64: AttentionConfig(64, 128, 8, 2),  # (223, 209, 65)
        128: AttentionConfig(32, 128, 8, 2),  # (231, 234, 96)
        256: AttentionConfig(32, 64, 8, 3),  # (255, 255, 161)
    },
    "sm_100": {
        64: AttentionConfig(64, 128, 8, 2),  # (128, 231, 81)
        128: AttentionConfig(32, 128, 8, 2),  # (127, 126, 112), 64 tokens spill 20 words at 80
        256: AttentionConfig(32, 64, 8, 2),  # (126, 128, 160)
    },
    "small": {
        64: AttentionConfig(32, 64, 4, 2),  # sm_89: (180, 178, 24)
        128: AttentionConfig(32, 64, 8, 2),  # sm_89: (171, 174, 52)
        256: AttentionConfig(32, 32, 8, 2),  # sm_89: (136, 163, 66)
    },
    "gfx942": {
        64: AttentionConfig(32, 64, 4, 2),  # (294, 338, 12), 64 rows spill 41 words on triton 3.6
        128: AttentionConfig(32, 64, 4, 2),  # (370, 400, 20)
        256: AttentionConfig(32, 32, 4, 1),  # (424, 457, 16)
    },
}
DQUERY_16BIT: _Attention = {
    "sm_80": {
        64: AttentionConfig(64, 64, 4, 2),  # (184, 255, 36)
        128: AttentionConfig(64, 64, 8, 2),  # (168, 221, 80)
        256: AttentionConfig(64, 64, 8, 1),  # (228, 255, 128)
    },
    "sm_90": {
        64: AttentionConfig(128, 64, 8, 3),  # (128, 188, 80)
        128: AttentionConfig(128, 64, 8, 2),  # (176, 255, 128)
        256: AttentionConfig(128, 32, 8, 2),  # (231, 255, 192)
    },
    "sm_100": {
        64: AttentionConfig(128, 64, 8, 3),  # (102, 238, 88)
        128: AttentionConfig(128, 64, 8, 2),  # (112, 210, 144)
        256: AttentionConfig(64, 64, 8, 2),  # (117, 165, 224)
    },
    "small": {
        64: AttentionConfig(64, 32, 4, 2),  # sm_89: (164, 182, 28)
        128: AttentionConfig(64, 32, 8, 2),  # sm_89: (132, 174, 56)
        256: AttentionConfig(64, 16, 8, 1),  # sm_89: (204, 248, 80), 32 slots spill 8 words
    },
    "gfx942": {
        64: AttentionConfig(128, 64, 8, 2),  # (181, 221, 32)
        128: AttentionConfig(64, 32, 4, 2),  # (262, 265, 20)
        256: AttentionConfig(32, 32, 4, 1),  # (328, 336, 16)
    },
}

# float32 without tensor cores: exact products are sums of scalar ones, whose operands live in
# registers, so that tiles of 64 x 64 spill by thousands of words
FORWARD_FLOAT32: dict[int, AttentionConfig] = {
    # not 64 rows: triton 3.6 makes TF32 products of them on sm_100, whatever the kernel asks for
    64: AttentionConfig(32, 64, 8, 2),  # (76, 80, 48) at most
    128: AttentionConfig(32, 32, 16, 2),  # (64, 70, 52) at most
    256: AttentionConfig(16, 32, 8, 2),  # (80, 80, 82) at most
}
DKEY_VALUE_FLOAT32: dict[int, AttentionConfig] = {
    64: AttentionConfig(32, 32, 8, 2),  # (92, 96, 36) at most
    128: AttentionConfig(16, 32, 8, 2),  # 120 at most; of 16 warps up to 8 words spill
    256: AttentionConfig(16, 32, 8, 2),  # (170, 194, 98) at most
}
# by target and padded head width: where those spill 6 words, at 80 registers
DKEY_VALUE_FLOAT32_FITTED: dict[tuple[str, int], AttentionConfig] = {
    ("small", 16): AttentionConfig(16, 32, 8, 2),  # sm_120: (78, 80, 8)
}
DQUERY_FLOAT32: dict[int, AttentionConfig] = {
    64: AttentionConfig(32, 64, 16, 2),  # (54, 54, 56) at most
    128: AttentionConfig(32, 32, 8, 2),  # (97, 80, 68) at most; of 16 warps 6 words spill
    256: AttentionConfig(32, 16, 8, 2),  # (140, 145, 98) at most
}
# gfx942 has 64 KB of shared memory and warps of 64 lanes
FLOAT32_GFX942: dict[int, AttentionConfig] = {
    64: AttentionConfig(32, 32, 4, 1),  # (291, 295, 8) at most
    128: AttentionConfig(32, 16, 4, 1),  # (246, 256, 16) at most
    256: AttentionConfig(16, 16, 4, 1),  # (324, 338, 16) at most
}

# float32 by TF32 tensor cores, for who asked PyTorch for that: 4 bytes an element, and no form but
# pointers. The largest tiles that do not spill with a slot mask, dropout and heads of 80 columns.
FORWARD_TF32: _Attention = {
    "sm_80": {
        64: AttentionConfig(64, 64, 4, 2),  # (181, 168, 48)
        128: AttentionConfig(32, 32, 4, 2),  # (143, 168, 52)
        256: AttentionConfig(32, 32, 8, 2),  # (141, 178, 100)
    },
    # wgmma wants 64 rows
    "sm_90": {
        64: AttentionConfig(64, 64, 4, 2),  # (179, 223, 80)
        128: AttentionConfig(64, 32, 8, 2),  # (140, 174, 96)
        256: AttentionConfig(64, 32, 8, 2),  # (206, 250, 192)
    },
    "small": {
        64: AttentionConfig(64, 64, 4, 2),  # (150, 185, 48) at most
        128: AttentionConfig(32, 32, 4, 2),  # (143, 176, 52) at most
        256: AttentionConfig(16, 32, 8, 1),  # (121, 128, 50) at most
    },
}
DKEY_VALUE_TF32: _Attention = {
    "sm_80": {
        64: AttentionConfig(32, 32, 8, 2),  # (126, 126, 44)
        128: AttentionConfig(32, 32, 8, 1),  # (128, 135, 84)
        256: AttentionConfig(16, 32, 8, 1),  # (168, 178, 114)
    },
    "sm_90": {
        64: AttentionConfig(32, 64, 8, 2),  # (148, 181, 56)
        128: AttentionConfig(16, 64, 8, 1),  # (166, 188, 88)
        256: AttentionConfig(32, 32, 8, 1),  # (182, 186, 164)
    },
    "small": {
        64: AttentionConfig(32, 32, 8, 2),  # (102, 128, 44) at most
        128: AttentionConfig(32, 32, 8, 1),  # (128, 146, 84) at most
        256: AttentionConfig(16, 16, 8, 1),  # (108, 146, 81) at most
    },
}
DQUERY_TF32: _Attention = {
    "sm_80": {
        64: AttentionConfig(64, 32, 8, 2),  # (172, 216, 52)
        128: AttentionConfig(32, 32, 8, 2),  # (126, 142, 80)
        256: AttentionConfig(32, 32, 8, 2),  # (168, 186, 160)
    },
    "sm_90": {
        64: AttentionConfig(64, 32, 8, 2),  # (114, 141, 64)
        128: AttentionConfig(64, 32, 8, 2),  # (137, 172, 128)
        256: AttentionConfig(32, 32, 8, 2),  # (142, 190, 160)
    },
    "small": {
        64: AttentionConfig(64, 32, 8, 2),  # (176, 206, 52) at most
        128: AttentionConfig(32, 32, 8, 2),  # (128, 180, 80) at most
        256: AttentionConfig(32, 16, 8, 1),  # (188, 186, 96) at most
    },
}
for _table in (FORWARD_TF32, DKEY_VALUE_TF32, DQUERY_TF32):
    _table["sm_100"] = _table["sm_90"]

# Heads whose rows are not 16-byte aligned (odd widths, odd strides): every element has an address
# of its own, which takes the registers of larger tiles. float32 above 128 spills all the same: up
# to 76 words in dK and dV, 70 in dQ.
RAGGED_FORWARD: dict[int, AttentionConfig] = {
    64: AttentionConfig(32, 32, 8, 1),
    128: AttentionConfig(32, 32, 8, 1),  # (194, 204, 18)
    256: AttentionConfig(16, 32, 8, 1),  # (253, 255, 25)
}
RAGGED_DKEY_VALUE: dict[int, AttentionConfig] = {
    64: AttentionConfig(32, 32, 8, 1),
    128: AttentionConfig(32, 32, 8, 1),  # (241, 196, 40)
    256: AttentionConfig(16, 16, 8, 1),  # (150, 188, 40)
}
RAGGED_DQUERY: dict[int, AttentionConfig] = {
    64: AttentionConfig(32, 32, 8, 1),
    128: AttentionConfig(32, 32, 8, 1),  # (188, 254, 32)
    256: AttentionConfig(16, 16, 8, 1),
}
RAGGED_FLOAT32: dict[int, AttentionConfig] = {
    64: AttentionConfig(32, 16, 8, 2),
    128: AttentionConfig(16, 16, 8, 1),
    256: AttentionConfig(16, 16, 8, 1),
}
RAGGED_DQUERY_FLOAT32: dict[int, AttentionConfig] = {
    64: AttentionConfig(32, 16, 8, 2),
    128: AttentionConfig(32, 16, 8, 2),  # (152, 166, 50)
    256: AttentionConfig(32, 16, 8, 2),
}


class Candidate(NamedTuple):
    """A form that hardware is to judge: the sweep of the GPU programme times it.

    Args:
        config: of the launch.
        predicted: TFLOP/s of the kernel's own products, hidden ones left out, on an H100.
        releases: of Triton that compile it; () means all.
    """

    config: AttentionConfig
    predicted: int
    releases: tuple[str, ...] = ()

    def is_for(self, version: str) -> bool:
        """Whether this version of Triton compiles it."""
        return not self.releases or ".".join(version.split(".")[:2]) in self.releases


# By kernel and padded head width, for sm_90 and 16 bits. Predictions are of a model (750 TFLOP/s of
# products, 128 bytes a clock of shared memory, softmax that overlaps in part). In brackets:
# registers without and with dropout, kilobytes of shared memory. Of two stages the next tiles are
# asked for after the last product of a step and waited for before the first of the next; of three,
# a whole step before.
CANDIDATES: dict[tuple[str, int], tuple[Candidate, ...]] = {
    ("forward", 64): (
        Candidate(AttentionConfig(128, 128, 8, 2, "descriptors"), 340),  # (166, 206, 80)
        Candidate(AttentionConfig(128, 128, 8, 3, "descriptors"), 360),  # (165, 206, 112)
        # two programs a multiprocessor
        Candidate(AttentionConfig(128, 64, 8, 3, "descriptors"), 380),  # (109, 128, 64)
        Candidate(AttentionConfig(64, 128, 4, 2, "specialized"), 340),  # (168, 168, 88)
        Candidate(AttentionConfig(128, 128, 4, 2, "specialized"), 370, ("3.6",)),  # (168, 168, 96)
    ),
    ("forward", 128): (
        Candidate(AttentionConfig(128, 128, 8, 2, "descriptors"), 400),  # (197, 234, 160)
        Candidate(AttentionConfig(128, 64, 8, 3, "descriptors"), 420),  # (144, 168, 128)
        Candidate(AttentionConfig(64, 128, 4, 2, "specialized"), 400),  # (168, 168, 160)
        Candidate(AttentionConfig(128, 128, 4, 2, "specialized"), 480, ("3.6",)),  # (168, 168, 176)
    ),
    ("forward", 256): (
        Candidate(AttentionConfig(128, 64, 8, 2, "descriptors"), 380),  # (206, 237, 192)
        Candidate(AttentionConfig(128, 32, 8, 3, "descriptors"), 330),  # (204, 200, 160)
        Candidate(AttentionConfig(64, 64, 4, 2, "specialized"), 380),  # (168, 168, 192)
        Candidate(AttentionConfig(128, 64, 4, 2, "specialized"), 450, ("3.6",)),  # (168, 168, 224)
    ),
    ("dkey_value", 64): (
        Candidate(AttentionConfig(64, 128, 8, 2, "descriptors"), 330),  # (224, 195, 64)
        Candidate(AttentionConfig(64, 128, 8, 3, "descriptors"), 340),  # (254, 214, 81)
        Candidate(AttentionConfig(64, 64, 4, 2, "specialized"), 330),  # (168, -, 64)
    ),
    ("dkey_value", 128): (
        Candidate(AttentionConfig(32, 128, 8, 2, "descriptors"), 340),  # (216, 243, 96)
        Candidate(AttentionConfig(32, 128, 8, 3, "descriptors"), 350),  # (220, 242, 112)
        Candidate(AttentionConfig(32, 128, 4, 2, "specialized"), 370, ("3.6",)),  # (168, -, 112)
    ),
    ("dkey_value", 256): (
        Candidate(AttentionConfig(32, 64, 8, 2, "descriptors"), 260),  # (255, 255, 128)
        Candidate(AttentionConfig(32, 64, 8, 3, "descriptors"), 270),  # (255, 255, 160)
    ),
    ("dquery", 64): (
        Candidate(AttentionConfig(128, 128, 8, 2, "descriptors"), 340),  # (238, 252, 96)
        Candidate(AttentionConfig(128, 64, 8, 3, "descriptors"), 350),  # (141, 164, 80)
        Candidate(AttentionConfig(64, 128, 4, 2, "specialized"), 340),  # (168, -, 96)
    ),
    ("dquery", 128): (
        Candidate(AttentionConfig(128, 128, 8, 2, "descriptors"), 400),  # (234, 255, 192)
        Candidate(AttentionConfig(128, 64, 8, 3, "descriptors"), 420),  # (173, 200, 160)
        Candidate(AttentionConfig(64, 128, 4, 2, "specialized"), 400),  # (168, -, 176)
    ),
    ("dquery", 256): (
        Candidate(AttentionConfig(128, 32, 8, 2, "descriptors"), 360),  # (206, 216, 192)
        Candidate(AttentionConfig(64, 64, 4, 2, "descriptors"), 380),  # (251, 253, 192)
        Candidate(AttentionConfig(64, 32, 4, 3, "descriptors"), 360),  # (204, 215, 160)
        Candidate(AttentionConfig(128, 64, 8, 1, "descriptors"), 400),  # (249, 247, 192)
    ),
}
# By kernel, target and width, those that hardware found to be faster than the tables above, for the
# calls that a descriptor can serve; forward, too few programs take FORWARD_16BIT_FEW all the same.
# A descriptor costs 3 us of Python a tensor, which short calls have to win back. No kernel of this
# package has run on hardware yet.
MEASURED: dict[tuple[str, str, int], AttentionConfig] = {}

# The same where slots are few, of the resident form, which needs no descriptor and takes slot
# masks: for up to so many as its tile has, with dropout for half of them, as random numbers take
# registers. Predicted is what products and softmax allow (of dQ at 256 with loads that overlap
# little, as two tensors leave room for two stages); of N slots no more than N times FEW_BY_MEMORY,
# which is what comes and goes with the tokens at 90 % of 3 TB/s, forward and dQ alike.
FEW_BY_MEMORY = 2.7
CANDIDATES_FEW: dict[tuple[str, int], tuple[Candidate, ...]] = {
    ("forward", 64): (
        Candidate(AttentionConfig(64, 128, 4, 3, "resident"), 300),  # (201, 166, 64)
        Candidate(AttentionConfig(64, 256, 8, 3, "resident"), 300),  # (255, 255, 96)
    ),
    ("forward", 128): (
        Candidate(AttentionConfig(64, 128, 8, 3, "resident"), 320),  # (220, 176, 128)
    ),
    ("forward", 256): (
        Candidate(AttentionConfig(64, 64, 8, 3, "resident"), 320),  # (246, 212, 176)
        Candidate(AttentionConfig(64, 128, 8, 2, "resident"), 320),  # (255, 242, 208)
    ),
    ("dquery", 64): (
        Candidate(AttentionConfig(64, 128, 8, 3, "resident"), 280),  # (255, 208, 89)
    ),
    ("dquery", 128): (
        Candidate(AttentionConfig(64, 64, 8, 3, "resident"), 320),  # (187, 168, 145)
        Candidate(AttentionConfig(64, 128, 8, 2, "resident"), 320),  # (255, 250, 144)
    ),
    ("dquery", 256): (
        Candidate(AttentionConfig(64, 64, 8, 2, "resident"), 160),  # (210, 208, 208)
    ),
}


class Few(NamedTuple):
    """A form that keeps all slots, where hardware found it to be faster.

    Args:
        config: of the launch, whose tile has the most slots.
        least_slots: from how many on.
    """

    config: AttentionConfig
    least_slots: int = 1


MEASURED_FEW: dict[tuple[str, str, int], Few] = {}


class Library(NamedTuple):
    """One of PyTorch's own kernels of the forward (:mod:`lm2_kernels.backends.triton.library`).

    Args:
        name: "cudnn" or "flash".
        least_tokens: from which T = N on it is the faster one.
        least_pairs: of batch times heads.
    """

    name: str
    least_tokens: int
    least_pairs: int


# By target and head width, where hardware found one to be faster than every form above: none yet.
# "where", of the GPU programme, measures that.
LIBRARY: dict[tuple[str, int], Library] = {}

# programs in flight on the GPUs of the table, one a multiprocessor (108 to 148)
_ONE_WAVE = 132
# dK and dV are summed in parts of so many tokens or more, and in so many parts or none: fewer would
# not be worth adding up the sums, which takes two short launches
_LEAST_TOKENS = 128
_LEAST_PARTS = 4


def _attention(
    by_target: _Attention,
    float32: dict[int, AttentionConfig],
    ragged: dict[int, AttentionConfig],
    ragged_float32: dict[int, AttentionConfig],
    target: str,
    dtype: torch.dtype,
    block_k: int,
    is_ragged: bool,
    tf32: _Attention | None,
) -> AttentionConfig:
    # heads narrower than 64 take the tiles of 64
    width = max(64, block_k)
    if tf32 is not None:
        return tf32[target][width]
    if dtype == torch.float32:
        if target == "gfx942":
            return FLOAT32_GFX942[width]
        return (ragged_float32 if is_ragged else float32)[width]
    if not is_ragged:
        return by_target[target][width]
    # a warp of gfx942 has 64 lanes, and more registers a lane for fewer warps
    return ragged[width]._replace(num_warps=4) if target == "gfx942" else ragged[width]


def takes_tf32(target: str, is_ragged: bool) -> bool:
    """Whether there are kernels of float32 by TF32 tensor cores."""
    return target in FORWARD_TF32 and not is_ragged


def _measured(
    kernel: str,
    target: str,
    dtype: torch.dtype,
    block_k: int,
    is_ragged: bool,
    num_slots: int,
    takes_descriptors: bool,
    has_dropout: bool,
) -> AttentionConfig | None:
    """``takes_descriptors``: whether the call is one that a descriptor can serve."""
    if dtype == torch.float32 or is_ragged:
        return None
    key = (kernel, target, max(64, block_k))
    few = MEASURED_FEW.get(key)
    if few is not None:
        most = few.config.block_slots // (2 if has_dropout else 1)
        if few.least_slots <= num_slots <= most:
            return _for_slots(few.config, num_slots)
    found = MEASURED.get(key) if takes_descriptors else None
    if found is None or num_slots < found.block_slots:
        return None
    # warps of dQ have no registers for the random numbers at 128, 36 words spill, those of dK and
    # dV few: one rule for both
    if has_dropout and found.form == "specialized" and kernel != "forward":
        return None
    return found


def _for_slots(config: AttentionConfig, num_slots: int) -> AttentionConfig:
    """The tile no wider than few slots need, and not below 16, the least that a product takes."""
    block_slots = max(16, 1 << (num_slots - 1).bit_length())
    if block_slots >= config.block_slots:
        return config
    # 16 warps would have next to nothing to do, and spill 6 words
    return config._replace(block_slots=block_slots, num_warps=min(8, config.num_warps))


def attention_forward(
    target: str,
    dtype: torch.dtype,
    block_k: int,
    is_ragged: bool,
    num_pairs: int,
    num_tokens: int,
    num_slots: int,
    takes_descriptors: bool,
    has_dropout: bool,
    tf32: bool,
) -> AttentionConfig:
    """``num_pairs``: batch times heads; ``tf32``: of float32 by TF32 tensor cores."""
    tables = (FORWARD_16BIT, FORWARD_FLOAT32, RAGGED_FORWARD, RAGGED_FLOAT32)
    by_form = (target, dtype, block_k, is_ragged, num_slots, takes_descriptors, has_dropout)
    config = _measured("forward", *by_form)
    if config is not None and config.keeps_slots:
        return config
    if config is None:
        by_tf32 = FORWARD_TF32 if tf32 else None
        config = _attention(*tables, target, dtype, block_k, is_ragged, by_tf32)
    num_programs = num_pairs * -(-num_tokens // config.block_tokens)
    if config.block_tokens == 128 and num_programs < _ONE_WAVE and target.startswith("sm_"):
        config = FORWARD_16BIT_FEW[max(64, block_k)]
    return _for_slots(config, num_slots)


def attention_library(target: str, head_width: int, num_pairs: int, num_tokens: int) -> str | None:
    """The kernel of PyTorch that is faster forward in 16 bits, without mask and dropout."""
    found = LIBRARY.get((target, head_width))
    if found is None or num_pairs < found.least_pairs or num_tokens < found.least_tokens:
        return None
    return found.name


def attention_dkey_value(
    target: str,
    dtype: torch.dtype,
    block_k: int,
    is_ragged: bool,
    num_slots: int,
    takes_descriptors: bool,
    has_dropout: bool,
    tf32: bool,
) -> AttentionConfig:
    by_form = (target, dtype, block_k, is_ragged, num_slots, takes_descriptors, has_dropout)
    measured = _measured("dkey_value", *by_form)
    if measured is not None:
        return measured
    tables = (DKEY_VALUE_16BIT, DKEY_VALUE_FLOAT32, RAGGED_DKEY_VALUE, RAGGED_FLOAT32)
    by_tf32 = DKEY_VALUE_TF32 if tf32 else None
    config = _attention(*tables, target, dtype, block_k, is_ragged, by_tf32)
    if dtype == torch.float32 and not is_ragged and not tf32:
        config = DKEY_VALUE_FLOAT32_FITTED.get((target, block_k), config)
    if has_dropout:
        # triton 3.6 at width 256 on sm_90: 10 words are spilled by dropout with three stages, none
        # with two, which without dropout spill 2
        config = config._replace(num_stages=min(2, config.num_stages))
    few = _for_slots(config, num_slots)
    # 64 rows of tcgen05 take as long as 128 do, and spill 12 words
    return config if target == "sm_100" and few.block_slots == 64 else few


def attention_part(num_programs: int, num_tokens: int, block_tokens: int) -> int:
    """How many tokens a program of dK and dV runs over, of all that its slots are seen by.

    ``num_programs``: how many there are without parts. Together they make about one wave.
    """
    parts = min(_ONE_WAVE // num_programs, num_tokens // _LEAST_TOKENS)
    if parts < _LEAST_PARTS:
        parts = 1
    return -(-num_tokens // (parts * block_tokens)) * block_tokens


def attention_run(config: AttentionConfig, num_pairs: int, num_tokens: int) -> int:
    """How many tokens a program runs over that keeps all slots of a head.

    Programs run in waves, the last of which may leave multiprocessors idle; and each loads its
    slots, which takes about as long as a block of tokens. The fewest waves of the fewest blocks,
    with two programs of 4 warps on a multiprocessor.
    """
    blocks = -(-num_tokens // config.block_tokens)
    at_once = _ONE_WAVE * 8 // config.num_warps

    def duration(parts: int) -> int:
        return -(-num_pairs * parts // at_once) * (-(-blocks // parts) + 1)

    parts = min(range(1, min(blocks, at_once) + 1), key=duration)
    return -(-blocks // parts) * config.block_tokens


def attention_dquery(
    target: str,
    dtype: torch.dtype,
    block_k: int,
    is_ragged: bool,
    num_slots: int,
    takes_descriptors: bool,
    has_dropout: bool,
    tf32: bool,
) -> AttentionConfig:
    by_form = (target, dtype, block_k, is_ragged, num_slots, takes_descriptors, has_dropout)
    measured = _measured("dquery", *by_form)
    if measured is not None:
        return measured
    tables = (DQUERY_16BIT, DQUERY_FLOAT32, RAGGED_DQUERY, RAGGED_DQUERY_FLOAT32)
    by_tf32 = DQUERY_TF32 if tf32 else None
    return _for_slots(_attention(*tables, target, dtype, block_k, is_ragged, by_tf32), num_slots)


def attention_delta_rows(dtype: torch.dtype, block_k: int) -> int:
    """Rows of one program of the delta pass.

    32 elements a thread of 4 warps; in float32 the fewest that a product takes, as it computes all
    pairs of rows for the sake of the diagonal.
    """
    return 16 if dtype == torch.float32 else min(128, 4096 // block_k)


# --- pointwise, normalisation and pooling ------------------------------------------------------

# Tiles have 8 elements a thread where nothing else is said: two (float32) or one (16-bit) 16-byte
# access per thread, tensor and tile. Registers: sm_90, the larger of float32 and bfloat16.


def _fitted(config: Config, target: str) -> Config:
    # a warp of gfx942 has 64 lanes: half the warps keep the elements per thread
    if target != "gfx942":
        return config
    return config._replace(num_warps=max(1, config.num_warps // 2))


MEMORY_UPDATE = {
    # 60 registers forward and 80 backward leave 1024 and 768 threads a multiprocessor, each with 5
    # to 8 loads of 16 bytes in flight: more than it takes to fill the memory bus
    "wide": Config(4, 512, 8),
    # widths up to 128: more rows instead of masked columns
    "narrow": Config(16, 128, 8),
    # one token: no masked rows, and 4 elements a thread, as latency counts and not the bus
    "token": Config(1, 512, 4),
}


def memory_update(target: str, num_tokens: int, width: int) -> Config:
    if num_tokens == 1:
        kind = "token"
    else:
        kind = "narrow" if width <= 128 else "wide"
    return _fitted(MEMORY_UPDATE[kind], target)


# By tokens per slot, where these are several: a program walks the tokens of one, BLOCK_T at a time,
# in tiles no taller than a slot. Registers where rows are aligned to 16 bytes: 104 forward and 128
# backward at most, two programs a multiprocessor with 28 kilobytes in flight each (138, and one,
# backward in 16 bits where the memory is shown).
MEMORY_UPDATE_CHUNKED = {
    2: Config(2, 512, 4),
    4: Config(4, 512, 8),
    8: Config(8, 256, 8),
    16: Config(16, 128, 8),
    # and more: rows of 128 bytes in 16-bit dtypes
    32: Config(32, 64, 8),
}
# Of more than 64 tokens, with fewer programs than fill a GPU: twice as many, of 4 elements a thread
# (83 registers), as a program that is alone on its multiprocessor has to hide its own latency.
MEMORY_UPDATE_CHUNKED_FEW = Config(64, 32, 16)


def memory_update_chunked(
    target: str, num_slots: int, tokens_per_slot: int, width: int, sums_gates: bool
) -> Config:
    """``num_slots``: of all batch entries together; ``sums_gates``: besides the row of memory."""
    config = MEMORY_UPDATE_CHUNKED[min(32, 1 << (tokens_per_slot - 1).bit_length())]
    num_programs = num_slots * -(-width // config.block_cols)
    if tokens_per_slot > 64 and num_programs < 2 * _ONE_WAVE:
        config = MEMORY_UPDATE_CHUNKED_FEW
    if sums_gates:
        # four sums, and what each has lost: fewer elements a thread, and one program of 16 warps
        # (128 registers at most) a multiprocessor in place of two of 8
        config = config._replace(num_warps=min(16, 2 * config.num_warps))
    return _fitted(config, target)


# A block holds whole rows, padded to a power of two, in registers: two-pass variance needs no
# second read. Narrow rows share a block, so that every warp of it has work.
RESIDUAL_LAYER_NORM = {
    128: Config(8, 128, 4),
    256: Config(4, 256, 4),
    512: Config(2, 512, 4),
    1024: Config(1, 1024, 4),
    2048: Config(1, 2048, 8),
    4096: Config(1, 4096, 16),
    # 16 elements a thread: 32 warps of 8 elements start slower, as one block fills a multiprocessor
    8192: Config(1, 8192, 16),
}
# The backward holds two sums per column besides: 88 registers up to 4096 columns, but a few words
# spilled at 8192 with 16 warps and more with 32.
RESIDUAL_LAYER_NORM_BACKWARD_COLS = 4096
# It walks over rows, and each waits for its mean and its means of gradients: so that the memory bus
# does not wait with it, the next rows are loaded meanwhile (12 kilobytes of shared memory at 2048
# columns in 16 bits). Not on gfx942, where the compiler has no such copies.
RESIDUAL_LAYER_NORM_BACKWARD_STAGES = 2
# Above that, passes over whole rows loop over columns ...
RESIDUAL_LAYER_NORM_WIDE = Config(1, 4096, 16)
# ... and the rest of the backward works on column blocks.
RESIDUAL_LAYER_NORM_COLUMNS = Config(1, 2048, 8)


def residual_layer_norm(target: str, width: int, backward: bool) -> Config | None:
    """None where a row is too wide for one block: then the two functions below."""
    if backward and width > RESIDUAL_LAYER_NORM_BACKWARD_COLS:
        return None
    for widest, config in RESIDUAL_LAYER_NORM.items():
        if width <= widest:
            fitted = _fitted(config, target)
            return _staged(fitted, target) if backward else fitted
    return None


def _staged(config: Config, target: str) -> Config:
    if target == "gfx942":
        return config
    return config._replace(num_stages=RESIDUAL_LAYER_NORM_BACKWARD_STAGES)


def residual_layer_norm_wide(target: str) -> Config:
    return _fitted(RESIDUAL_LAYER_NORM_WIDE, target)


def residual_layer_norm_columns(target: str) -> Config:
    return _staged(_fitted(RESIDUAL_LAYER_NORM_COLUMNS, target), target)


# 128 columns: 256-byte rows in 16-bit dtypes, 64 for narrow models. 16 tokens: 4 steps to a chunk,
# and sums over few rows at a time, so that the error of float32 sums stays small. The wide tile has
# 16 elements a thread (141 registers backward), the narrow one 4: with 8, either spills two words
# for some widths that are no multiple of 16.
POOLED_GATE = {64: Config(16, 64, 8), 128: Config(16, 128, 4)}


def pooled_gate(target: str, width: int) -> Config:
    return _fitted(POOLED_GATE[64 if width <= 64 else 128], target)
