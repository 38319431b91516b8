"""The compiled parts, ``_C`` (CPU kernels) and ``_cuda``: loads them, or says why they are absent.

Importing this module never fails. What was built, and why not, the build left in ``_build.json``.
"""

import importlib
import importlib.machinery
import json
from pathlib import Path
from types import ModuleType

import torch

CPU_LEVEL_VARIABLE = "LM2_KERNELS_CPU_LEVEL"
_PACKAGE = Path(__file__).parent


def _read_record() -> dict:
    try:
        return json.loads((_PACKAGE / "_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        reason = "this copy of the package was never built; run `pip install .`"
        return {"cpu": reason, "cuda": reason}


def _load_cpu() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("lm2_kernels._C"), None
    except ModuleNotFoundError as error:
        if error.name == "lm2_kernels._C":
            return None, f"its C++ kernels were not built: {_record.get('cpu') or 'unknown'}"
        return None, f"its C++ kernels do not load: {error}"
    except Exception as error:  # whatever a broken library does, the package has to import
        return None, f"its C++ kernels do not load: {error}"


def _load_cuda() -> str | None:
    if _cpu_reason is not None:
        return _cpu_reason
    names = (f"_cuda{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    path = next((p for p in map(_PACKAGE.joinpath, names) if p.exists()), None)
    if path is None:
        return f"its CUDA kernels were not built: {_record.get('cuda') or 'unknown'}"
    try:
        torch.ops.load_library(str(path))
    except Exception as error:
        return f"its CUDA kernels do not load: {error}"
    if torch.version.cuda is None:
        return "its CUDA kernels are built, but this torch has no CUDA"
    return None


_record = _read_record()
_C, _cpu_reason = _load_cpu()
_cuda_reason = _load_cuda()


def cpu_reason() -> str | None:
    """Why the C++ kernels cannot run, or None."""
    return _cpu_reason


def cuda_reason(device_index: int | None = None) -> str | None:
    """Why the CUDA C++ kernels cannot run on this GPU, or None."""
    if _cuda_reason is not None:
        return _cuda_reason
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    capability = torch.cuda.get_device_capability(device_index)
    if not _covers(_record.get("cuda_archs", []), capability):
        built = ", ".join(_record.get("cuda_archs", []))
        major, minor = capability
        return (
            f"the GPU is sm_{major}{minor}, its CUDA kernels were built for {built}; rebuild with "
            f"TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )
    return None


def _covers(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether code built for ``archs`` ("8.0", "9.0a", "12.0+PTX") runs on a GPU.

    Binaries run on the same major version from their minor on, those with an "a" on exactly their
    own (taken to hold for "f" as well); PTX on everything newer.
    """
    for arch in archs:
        number = arch.removesuffix("+PTX")
        specific = number[-1] in "af"
        built = tuple(map(int, number.rstrip("af").split(".")))
        if built == capability:
            return True
        if specific:
            continue
        if built[0] == capability[0] and built[1] <= capability[1]:
            return True
        if arch.endswith("+PTX") and built <= capability:
            return True
    return False


def build_info() -> dict[str, str]:
    """What was built and what runs of it, for ``info``."""
    reasons = {"C++ kernels": _cpu_reason, "CUDA kernels": _cuda_reason}
    info = {
        name: "loaded" if reason is None else reason.removeprefix(f"its {name} ")
        for name, reason in reasons.items()
    }
    if _C is not None:
        info |= _C.build_info()
        info["SIMD level"] = _C.simd_level()
    if _record.get("cuda_archs"):
        info["nvcc"] = _record["nvcc"]
        info["CUDA archs"] = " ".join(_record["cuda_archs"])
    return info
