"""What a memory may start from and how long its segments are, and layers that start by computing
nothing: for every model.
"""

from torch import nn

from lm2_kernels.layers.paper import PaperMemory
from lm2_kernels.layers.release import ReleaseMemory

FORMULATIONS = ("paper", "release")


def check_start(
    op: str, formulation: str, memory_init: str, zero_init: bool, choices: tuple[str, ...]
) -> None:
    """Raise ValueError unless the bank's start goes with the formulation and with ``zero_init``."""
    for name, value, known in (
        ("formulation", formulation, FORMULATIONS),
        ("memory_init", memory_init, choices),
    ):
        if value not in known:
            raise ValueError(f"{op}: {name} must be one of {known}, got {value!r}")
    if formulation == "paper" and memory_init == "zeros":
        raise ValueError(
            f"{op}: memory_init='zeros' is for the release formulation: the paper's has no biases, "
            f"so what is read from zeros and written back is zeros for ever"
        )
    if zero_init and formulation == "release" and memory_init != "zeros":
        raise ValueError(
            f"{op}: zero_init of the release formulation needs memory_init='zeros': its output is "
            f"x plus the new memory, to which the old one contributes"
        )


def check_segments(op: str, memory_slots: int, segment_length: int, write: str) -> None:
    """Raise ValueError unless the tokens of a segment can be bound to the slots."""
    if write == "position" and segment_length > memory_slots:
        raise ValueError(
            f"{op}: write='position' binds each token of a segment to a slot of its own: "
            f"segment_length ({segment_length}) must be at most memory_slots ({memory_slots}); "
            f"write='chunk' binds several tokens to a slot"
        )
    if write == "chunk" and segment_length % memory_slots:
        raise ValueError(
            f"{op}: write='chunk' binds segment_length / memory_slots tokens to each slot: "
            f"segment_length ({segment_length}) must be a multiple of memory_slots ({memory_slots})"
        )


def tokens_bound(memory_slots: int, segment_length: int, write: str) -> int:
    """How many tokens of a segment are bound to a slot; 1 where no layer has any slots."""
    return max(segment_length // memory_slots, 1) if write == "chunk" else 1


def silence(layer: PaperMemory | ReleaseMemory) -> None:
    """Have the layer give back ``x``: the paper's reads 0, the release's proposes 0.

    Of the release formulation that holds for a bank of zeros.
    """
    if isinstance(layer, PaperMemory):
        nn.init.zeros_(layer.value_proj.weight)
        return
    nn.init.zeros_(layer.attended_memory_layernorm2.weight)
    if layer.candidate == "token":
        nn.init.zeros_(layer.candidate_proj.weight)
