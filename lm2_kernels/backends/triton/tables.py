"""Launch configurations: one plain table, each entry with its reason. No autotuning.

Autotuning would launch untested configurations, differ from run to run, and break CUDA graph
capture. Every entry here is compiled ahead of time by the test suite for each of its targets, and
must not spill beyond what the entry says.

Targets (see ``launch.target``): sm_80, sm_90, sm_100, "small" (at most 100 KB of shared memory a
block: sm_86, sm_89, sm_120), gfx942.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """Tile sizes and resources of one launch."""

    block_rows: int
    block_cols: int
    num_warps: int
    num_stages: int = 1


# --- attention ---------------------------------------------------------------------------------

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
# The backward holds two sums per column besides: 76 registers up to 4096 columns, but a few words
# spilled at 8192 with 16 warps and more with 32.
RESIDUAL_LAYER_NORM_BACKWARD_COLS = 4096
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
            return _fitted(config, target)
    return None


def residual_layer_norm_wide(target: str) -> Config:
    return _fitted(RESIDUAL_LAYER_NORM_WIDE, target)


def residual_layer_norm_columns(target: str) -> Config:
    return _fitted(RESIDUAL_LAYER_NORM_COLUMNS, target)


# 128 columns: 256-byte rows in 16-bit dtypes, 64 for narrow models. 16 tokens (16 elements a
# thread, 141 registers backward): 4 steps to a chunk, and sums over few rows at a time, so that the
# error of float32 sums stays small.
POOLED_GATE = {64: Config(16, 64, 4), 128: Config(16, 128, 4)}


def pooled_gate(target: str, width: int) -> Config:
    return _fitted(POOLED_GATE[64 if width <= 64 else 128], target)
