"""A model on disk: ``config.json`` and ``model.safetensors`` in a folder."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_FORMAT = "lm2_kernels"


def save(folder: str | Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each whole or not at all."""
    from safetensors.torch import save_file  # noqa: PLC0415 - computing needs torch alone

    folder = Path(folder)
    save_config(folder, config)
    # parameters may share a buffer, and one may have two names: each gets a place of its own
    own = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    replace_file(folder / WEIGHTS, lambda path: save_file(own, path, metadata={"format": "pt"}))


def save_config(folder: Path, config: Mapping[str, object]) -> None:
    """Write the configuration alone."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": _FORMAT, **config}, indent=1) + "\n"
    replace_file(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def replace_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file beside ``path`` and move it there: whoever reads sees the old or the new one."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    write(part)
    os.replace(part, path)


def load(
    folder: str | Path, device: torch.device | str | None = None
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The configuration and the tensors that :func:`save` wrote.

    Raises:
        OSError: there is no such file.
        ValueError: a file is damaged or of another kind.
    """
    folder = Path(folder)
    return load_config(folder), load_tensors(folder / WEIGHTS, device)


def load_config(folder: Path) -> dict[str, object]:
    """The configuration alone, as :func:`load`."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.pop("format", None) != _FORMAT:
        raise ValueError(f"{folder / CONFIG} is not the configuration of an lm2_kernels model")
    return config


def load_tensors(path: str | Path, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a ``torch.save`` file of tensors alone.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged, or holds more than tensors.
    """
    from safetensors import SafetensorError  # noqa: PLC0415 - as above
    from safetensors.torch import load_file  # noqa: PLC0415

    path, device = Path(path), str(device or torch.get_default_device())
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path, device=device)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    try:
        tensors = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError and others
        raise ValueError(f"{path} is damaged or holds more than tensors: {error}") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} holds no state dict of tensors")
    return tensors


def check_keys(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError with every key that is missing, unexpected, or of another shape or kind."""
    wrong = {
        "missing": sorted(set(wanted) - set(got)),
        "unexpected": sorted(set(got) - set(wanted)),
        "of another shape": [
            f"{name} {tuple(got[name].shape)} for {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            # torch loads one number into a parameter of shape () or (1,)
            if name in got and (got[name].shape or (1,)) != (tensor.shape or (1,))
        ],
        "not floating-point": [n for n, tensor in got.items() if not tensor.is_floating_point()],
    }
    if any(wrong.values()):
        lines = [f"  {what}: {', '.join(names)}" for what, names in wrong.items() if names]
        raise ValueError("\n".join([f"{path} does not fit the configuration", *lines]))
