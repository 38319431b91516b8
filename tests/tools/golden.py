"""The golden files: a layer's tensors in float64, computed by other code than ours."""

from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

from lm2_kernels.testing.verify import packaged_golden

FILES = [*packaged_golden(), *sorted((Path(__file__).parent.parent / "data").glob("*.safetensors"))]


class Golden(NamedTuple):
    formulation: str
    num_heads: int
    num_blocks: int
    top_k: int | None
    slot_offset: int
    output: str
    slot_mask: Tensor | None
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    cotangents: tuple[Tensor, Tensor]
    outputs: tuple[Tensor, Tensor]
    gradients: dict[str, Tensor]  # of x, memory and the parameters


def load(path: Path) -> Golden:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict

    def group(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{prefix}.")
        }

    inputs, outputs, cotangents = group("inputs"), group("outputs"), group("cotangents")
    slot_mask = inputs.pop("slot_mask", None)
    if "masked_slots" in inputs:
        # the released code's masks are True where hidden
        slot_mask = ~inputs.pop("masked_slots")
    return Golden(
        formulation=metadata["formulation"],
        num_heads=int(metadata["heads"]),
        num_blocks=int(metadata.get("num_blocks", 1)),
        top_k=int(metadata["topk"]) or None,
        slot_offset=int(metadata.get("slot_offset", 0)),
        output=metadata.get("output", "read"),
        slot_mask=slot_mask,
        weights=group("weights"),
        inputs=inputs,
        cotangents=(cotangents["y"], cotangents["memory"]),
        outputs=(outputs["y"], outputs["memory"]),
        gradients=group("grads"),
    )
