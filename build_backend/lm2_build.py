"""setuptools.build_meta, building against the torch that the target environment already has.

A frontend that isolates the build hides the installed torch and would download another: several
gigabytes, perhaps for another CUDA. So torch becomes a build requirement only where the target
environment has none that fits; otherwise the build imports the target's.
"""

import glob
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder

from setuptools import build_meta as _meta
from setuptools.build_meta import *  # the hooks not named below

TORCH = "torch>=2.11"
MINIMUM = (2, 11)
PYTHON_VARIABLE = "LM2_KERNELS_TORCH_PYTHON"
# run by an interpreter of the target environment: where its torch is, without importing it
_PROBE = """
import importlib.util, json, os, sys
found = None
spec = importlib.util.find_spec("torch")
if spec and spec.origin:
    version = {}
    exec(open(os.path.join(os.path.dirname(spec.origin), "version.py")).read(), version)
    found = {
        "version": version["__version__"],
        "python": list(sys.version_info[:2]),
        "path": [os.path.dirname(os.path.dirname(spec.origin))] + [p for p in sys.path if p],
    }
print(json.dumps(found))
"""


def _say(text: str) -> None:
    print(f"lm2_kernels: {text}", file=sys.stderr, flush=True)


def _ask(python: str) -> dict | None:
    """What an interpreter as the user starts it says of its torch, or None."""
    # pip's isolation is these variables: without them sys.path is the target environment's
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    try:
        answer = subprocess.run(
            [python, "-c", _PROBE],
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return json.loads(answer.stdout.strip().splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def _candidates() -> Iterator[str]:
    """Interpreters that may be the target environment's, best first."""
    chosen = os.environ.get(PYTHON_VARIABLE)
    if chosen:
        yield chosen
        return
    yield sys.executable
    if "PIP_BUILD_TRACKER" in os.environ:
        return  # pip runs the build with the target's own interpreter
    # uv and build run it with a temporary environment's; the target's is on PATH if activated
    folders = os.environ.get("PATH", "").split(os.pathsep)
    folders += [os.path.join(os.getcwd(), ".venv", "bin")]
    if os.environ.get("CONDA_PREFIX"):
        folders.append(os.path.join(os.environ["CONDA_PREFIX"], "bin"))
    for folder in filter(None, folders):
        python = os.path.join(folder, "python")
        if os.path.exists(python):
            yield python
    yield getattr(sys, "_base_executable", sys.executable)


class _Fallback:
    """Last on sys.meta_path: what the build environment lacks is imported from the target's.

    sys.path stays as it is, so no setuptools plugin of the target environment is picked up.
    """

    def __init__(self, path: list[str]):
        self.path = path

    def find_spec(self, name, path=None, target=None):
        return PathFinder.find_spec(name, self.path) if path is None else None


_found: bool | None = None


def _has_torch() -> bool:
    """Whether torch can be imported here, after looking into the target environment."""
    global _found
    if _found is None:
        _found = importlib.util.find_spec("torch") is not None or _use_targets()
    return _found


def _use_targets() -> bool:
    tried = list(dict.fromkeys(_candidates()))
    for python in tried:
        torch = _ask(python)
        # extension modules load in their own Python only
        if torch is None or torch["python"] != list(sys.version_info[:2]):
            continue
        if tuple(map(int, torch["version"].split("+")[0].split(".")[:2])) < MINIMUM:
            _say(f"torch {torch['version']} of {python} is older than {TORCH}: not used")
            continue
        sys.meta_path.append(_Fallback(torch["path"]))
        _say(f"building against torch {torch['version']} of {python}")
        return True
    _say(
        f"no {TORCH} in {', '.join(tried)}: taken as a build requirement, a large download. To "
        f"build against your own torch install it first, set {PYTHON_VARIABLE} to its "
        f"interpreter, or pass --no-build-isolation"
    )
    return False


def _is_pure() -> bool:
    """Whether nothing is to be compiled; setup.py reads these variables alike."""
    environment = os.environ
    return environment.get("LM2_KERNELS_BUILD") == "none" and environment.get("FORCE_CUDA") != "1"


def _is_ready() -> bool:
    """Whether the build has the torch it needs, after looking for one."""
    return _is_pure() or _has_torch()


def _requirements(ordinary: list[str]) -> list[str]:
    return ordinary if _is_ready() else [*ordinary, TORCH]


def get_requires_for_build_wheel(config_settings=None):
    return _requirements(_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _requirements(_meta.get_requires_for_build_editable(config_settings))


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _is_ready()
    # an earlier build's libraries must not go into this wheel
    for folder in glob.glob("build/lib*"):
        shutil.rmtree(folder)
    return _meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _is_ready()
    return _meta.build_editable(wheel_directory, config_settings, metadata_directory)
