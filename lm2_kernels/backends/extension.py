"""The compiled parts, ``_C`` (CPU kernels) and ``_cuda``: loads them, or says why they are absent.

Importing this module never fails. What was built, and why not, the build left in ``_build.json``.
"""

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch

from lm2_kernels.version import sources_digest

_PACKAGE = Path(__file__).parent.parent
_RECORD = "_build.json"


def _find_build() -> tuple[Path, dict]:
    """The folder of the libraries, and what the build said of them.

    In a source tree that was never built (`python -m lm2_kernels` imports what lies in the current
    folder) they are the installed copy's, if that was built from the same sources.
    """
    if (_PACKAGE / _RECORD).exists():
        return _PACKAGE, _read_record(_PACKAGE)
    reason = "this copy of the package was never built; run `pip install .`"
    sources = _PACKAGE.parent / "csrc"
    for entry in sys.path:
        folder = Path(entry, "lm2_kernels")
        if sources.is_dir() and folder != _PACKAGE and (folder / _RECORD).exists():
            record = _read_record(folder)
            if record.get("sources") == sources_digest(sources):
                return folder, record
            reason = (
                "this source tree was never built, and the copy installed in "
                f"{folder} is of other sources; run `pip install .`"
            )
    return _PACKAGE, {"cpu": reason, "cuda": reason}


def _read_record(folder: Path) -> dict:
    try:
        return json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = f"{folder / _RECORD} cannot be read: {error}"
        return {"cpu": reason, "cuda": reason}


def _library(name: str) -> Path | None:
    paths = (_folder / f"{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def _load_cpu() -> tuple[ModuleType | None, str | None]:
    path = _library("_C")
    if path is None:
        return None, f"its C++ kernels were not built: {_record.get('cpu') or 'unknown'}"
    try:
        spec = importlib.util.spec_from_file_location("lm2_kernels._C", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a broken library does, the package has to import
        return None, f"its C++ kernels do not load: {error}"
    return module, None


def _load_cuda() -> str | None:
    if _cpu_reason is not None:
        return _cpu_reason
    path = _library("_cuda")
    if path is None:
        return f"its CUDA kernels were not built: {_record.get('cuda') or 'unknown'}"
    try:
        torch.ops.load_library(str(path))
    except Exception as error:
        return f"its CUDA kernels do not load: {error}"
    if torch.version.cuda is None:
        return "its CUDA kernels are built, but this torch has no CUDA"
    return None


_folder, _record = _find_build()
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
        info["libraries"] = str(_folder)
        info["SIMD level"] = _C.simd_level()
    if _record.get("cuda_archs"):
        info["nvcc"] = _record["nvcc"]
        info["CUDA archs"] = " ".join(_record["cuda_archs"])
    return info
