"""A model on disk: ``config.json`` and ``model.safetensors`` in a folder."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath

import torch
from torch import Tensor

from lm2_kernels.disk import replace_file, replace_files
from lm2_kernels.state.hub import Place

__all__ = [
    "CONFIG",
    "FORMAT",
    "WEIGHTS",
    "check_keys",
    "is_own",
    "load",
    "load_config",
    "load_tensors",
    "read_json",
    "read_state",
    "read_tensors",
    "save",
    "weight_files",
    "write_state",
]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
FORMAT = "lm2_kernels"


def save(
    folder: str | Path,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write both files, and ``texts`` by their names: all of them whole, or none.

    Raises:
        OSError: they cannot be written.
        ValueError: the folder holds a model of another kind.
    """
    folder = Path(folder)
    if not is_own(folder):
        raise ValueError(
            f"{folder} holds a model of another kind ({CONFIG}, {WEIGHTS} or {INDEX} is not of "
            f"lm2_kernels): save into another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    texts = {CONFIG: json.dumps({"format": FORMAT, **config}, indent=1) + "\n", **(texts or {})}
    writes = {
        folder / name: lambda path, text=text: path.write_text(text, encoding="utf-8")
        for name, text in texts.items()
    }
    # last: of a model that a kill cut short the configuration says whose it is
    writes[folder / WEIGHTS] = _writer(tensors, {"format": "pt"})
    replace_files(writes)


def _writer(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> Callable[[Path], object]:
    """What writes a safetensors file of tensors and notes to a path."""
    from safetensors.torch import save_file  # noqa: PLC0415 - computing needs torch alone

    # tensors may share their memory, and one may have two names: each gets a place of its own
    own = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return lambda path: save_file(own, path, metadata=dict(notes))


def write_state(path: str | Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write a state as one safetensors file, whole or not at all.

    Args:
        path: of the file.
        tensors: by their names; they may share their memory.
        notes: texts that go with them.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    replace_file(path, _writer(tensors, notes))


def read_state(
    path: str | Path, device: torch.device | str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and notes that :func:`write_state` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - as above

    try:
        with safe_open(path, "pt", device=str(device)) as file:
            # copies: products may round by where a tensor lies, and in the file it lies anywhere
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None


def is_own(folder: Path) -> bool:
    """Whether no model is there but one that :func:`save` wrote."""
    if os.path.lexists(folder / INDEX):
        # it would decide what is loaded, whatever is saved beside it
        return False
    try:
        load_config(Place("", folder))
    except FileNotFoundError:
        return not any(os.path.lexists(folder / name) for name in (CONFIG, WEIGHTS))
    except ValueError:
        return False
    return True


def load(place: Place) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The configuration and the tensors that :func:`save` wrote, on the CPU.

    Raises:
        OSError: there is no such file.
        ValueError: a file is damaged or of another kind.
    """
    config, tensors = load_config(place), {}
    for path, names in weight_files(place).items():
        own = load_tensors(path, "cpu")
        tensors |= {name: own[name] for name in (own if names is None else names) if name in own}
    return config, tensors


def load_config(place: Place) -> dict[str, object]:
    """The configuration alone, as :func:`load`."""
    path = place.existing(CONFIG)
    config = read_json(path)
    if config.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not the configuration of an lm2_kernels model")
    return config


def read_json(path: Path) -> dict[str, object]:
    """The object in a file of JSON.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object: it is not the configuration of a model")
    return content


def weight_files(place: Place) -> dict[Path, list[str] | None]:
    """The files with a model's weights, each with the names of those to take; None is all.

    Where there is ``model.safetensors.index.json`` it decides, otherwise it is
    ``model.safetensors``; so it is beside an index whose files are gone, which an earlier save has
    left. Whatever else lies in the folder does not matter.

    Raises:
        OSError: a file is not there.
        ValueError: the index is damaged, or names a file outside of the folder.
    """
    index = place.path(INDEX)
    if not index.exists():
        return {place.existing(WEIGHTS): None}
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(f, str) for f in table.values()):
        raise ValueError(f"{index} is damaged: it has no 'weight_map' of names and files")
    found: dict[str, list[str]] = {}
    for name, file in table.items():
        if PurePath(file).is_absolute() or ".." in PurePath(file).parts or not file:
            raise ValueError(f"{index} names a file outside of its folder: {file!r}")
        found.setdefault(file, []).append(name)
    paths = {place.path(file): names for file, names in found.items()}
    missing = [path for path in paths if not path.is_file()]
    if not missing:
        return paths
    if place.path(WEIGHTS).is_file():
        return {place.path(WEIGHTS): None}
    raise FileNotFoundError(f"no such file: {missing[0]}, which {index} names")


def read_tensors(path: Path, names: Sequence[str] | None, pattern: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names match; nothing else is read.

    Args:
        path: the file.
        names: those to choose from, which must be there; None is all that are.
        pattern: a regular expression, searched for.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or one is missing.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - as above

    try:
        with safe_open(path, "pt") as file:
            there = set(file.keys())
            wanted = [n for n in (names or sorted(there)) if re.search(pattern, n)]
            missing = [name for name in wanted if name not in there]
            if missing:
                raise ValueError(f"{path} has no {', '.join(missing)}, which the index names")
            return {name: file.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


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
