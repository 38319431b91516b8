"""The GPU programme: what only an NVIDIA GPU can prove or measure, in sittings of some minutes.

    python benchmarks/gpu/run.py                    # the first sitting
    python benchmarks/gpu/run.py --sitting second   # and what the first left over
    python benchmarks/gpu/run.py --only sweep       # one phase
    python benchmarks/gpu/run.py --out FOLDER       # its results also go there
    python benchmarks/gpu/run.py --out FOLDER --rehearse  # on a CPU, tiny, interpreted

A bare clone will do. This process imports torch and never touches the GPU; each phase is forked
from it with a time limit, and so is each entry from its phase (``entries.py``). The folder
``benchmarks/results/gpu`` gets six files at most, written again all the time: ``summary.txt``;
``results.tar.xz`` with a JSON file and a log an entry, all benchmarks as ``bench.json``, and the
built extension; Triton's cache. A later run goes on from them, also on another machine of the same
GPU, torch and triton, while lm2_kernels/ and csrc/ are what they were.

Exit code 1 if something failed or was left for want of time, 2 without a GPU.
"""

import argparse
import contextlib
import functools
import importlib
import io
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import entries

ROOT = Path(__file__).resolve().parents[2]
# imports that take long, once for all; torch._dynamo may ask a GPU something, so it is not one
PRELOADED = ("torch.fx.experimental.symbolic_shapes", "triton")
# what was found; Triton's cache comes in so many archives beside it
_RESULTS, _CACHE_FILES = "results.tar.xz", 4
# how much of what failed is shown at the end
_MOST_SHOWN = 60
# seconds: between two packings, without which a phase is not begun, to which it may exceed its
# limit, of the build
_PACK, _LEAST, _GRACE, _BUILD = 20.0, 5.0, 10.0, 240.0


class Phase(NamedTuple):
    """Entries of a module, with a limit in seconds."""

    module: str
    limit: float
    at_once: int = 1
    needs_build: bool = False


PHASES = {
    "smoke": Phase("smoke", 100, at_once=8),
    "headline": Phase("timings", 110),
    "attention": Phase("timings", 90),
    "smoke_cpp": Phase("smoke", 60, at_once=8, needs_build=True),
    "suite": Phase("suite", 130, needs_build=True),
    "big": Phase("suite", 110, needs_build=True),
    "forms": Phase("suite", 60),
    "sanitizer": Phase("suite", 190, needs_build=True),
    "sweep": Phase("sweep", 150),
    "ncu": Phase("suite", 60),
    "graphs": Phase("timings", 60),
    "sweep_one": Phase("sweep", 150),
    "where": Phase("timings", 80),
    "peers": Phase("timings", 300, needs_build=True),
    "model": Phase("timings", 80, needs_build=True),
}


class Sitting(NamedTuple):
    """Phases in their order, and the seconds that they have together."""

    budget: float
    phases: tuple[str, ...]


# the first two fit into a quarter of an hour, the reading and mending between them too
SITTINGS = {
    "first": Sitting(420, ("smoke", "headline", "attention", "smoke_cpp", "suite")),
    "second": Sitting(300, ("smoke", "suite", "forms", "sweep", "graphs", "ncu", "big")),
    "third": Sitting(
        560, ("smoke", "sweep_one", "where", "peers", "model", "sanitizer", "suite", "big")
    ),
}


# --- what is forked: it imports the package, and what is built of the extension by then -----------


def machine(is_rehearsal: bool, folder: Path) -> int:
    """Record what results depend on, and by "key" the folder that they are kept in."""
    import torch  # noqa: PLC0415

    if not is_rehearsal and not torch.cuda.is_available():
        print(f"it needs an NVIDIA GPU, and torch {torch.__version__} sees none")
        return 2
    from lm2_kernels.backends.triton import launch  # noqa: PLC0415
    from lm2_kernels.bench import suite  # noqa: PLC0415
    from lm2_kernels.version import sources_digest  # noqa: PLC0415

    found = suite.conditions()
    gpu, versions = found["devices"][-1], found["versions"]
    digests = (sources_digest(ROOT / "lm2_kernels", "*.py"), sources_digest(ROOT / "csrc"))
    key = [gpu["name"], versions["torch"], versions["triton"], *(text[:8] for text in digests)]
    target = launch.target(None if is_rehearsal else 0)
    found |= {"key": " ".join(key), "digests": digests, "target": target}
    built_from = [sys.implementation.cache_tag, versions["torch"], str(gpu.get("capability"))]
    found["built_from"] = " ".join([*built_from, digests[1][:8]])
    entries.save(folder / "machine.json", found)
    return 0


def run_phase(context: entries.Context, name: str, until: float) -> int:
    """Fork the entries of a phase, one after the other or some at once."""
    module, folder = importlib.import_module(PHASES[name].module), context.folder / name
    left = entries.run(module.entries(context, name), folder, until, PHASES[name].at_once)
    if PHASES[name].module == "timings":
        module.join_reports(context.folder)
    rows = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    good = sum(row["ok"] for row in rows)
    print(f"{name}: {good} of {len(rows)} well, {left} left")
    return int(good < len(rows) or left > 0)


def build_extension(built: Path, capability: str) -> None:
    """Build it, and keep it for the next sitting."""
    command = ["nice", sys.executable, "setup.py", "build_ext", "--inplace"]
    # half of the cores: the other half launches what is measured
    os.environ["MAX_JOBS"] = str(max(1, (os.cpu_count() or 2) // 2))
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": capability}
    subprocess.run(command, env=environment, preexec_fn=entries.die_with_parent, check=True)
    part = built.with_name("built.part")
    part.mkdir(exist_ok=True)
    for file in (*ROOT.glob("lm2_kernels/*.so"), ROOT / "lm2_kernels" / "_build.json"):
        shutil.copy(file, part)
    part.rename(built)


# --- what forks: no thread, no package, no GPU ----------------------------------------------------


class Programme:
    """Runs phases, and packs what there is all the while."""

    def __init__(self, places: list[Path], work: Path, budget: float, is_rehearsal: bool):
        """``places``: folders that get the results, and whose newest are gone on from."""
        self.places, self.results, self.cache = places, work / "results", work / "cache"
        self.end, self.is_rehearsal = time.time() + budget, is_rehearsal
        self.build: entries.Child | None = None
        self.build_end = 0.0
        self.folder: Path | None = None  # of this machine and these sources
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        # of each archive the newest that is whole
        for name in sorted({file.name for place in places for file in place.glob("*.tar.xz")}):
            files = [place / name for place in places if (place / name).exists()]
            for file in sorted(files, key=lambda file: -file.stat().st_mtime):
                if self._unpack(file, work):
                    for place in places:
                        if not (place / name).exists():
                            shutil.copy(file, place)
                    break
        self.results.mkdir(exist_ok=True)
        self.num_cached = len(list(self.cache.glob("*")))

    def _unpack(self, file: Path, work: Path) -> bool:
        try:
            with tarfile.open(file) as archive:
                archive.extractall(work, filter="data")
        except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
            print(f"{file.name} is of no use: {type(error).__name__}")
            if file.name == _RESULTS:
                # perhaps it was the disk: it is not written over
                file.rename(file.with_suffix(".spoilt"))
            return False
        return True

    def run(self, names: Collection[str]) -> int:
        find = functools.partial(machine, self.is_rehearsal, self.results)
        code = self.do("machine", find, 120.0)
        if code != 0:
            return code or 1
        for name in PRELOADED:
            importlib.import_module(name)
        found = entries.load(self.results, "machine")
        folder = self.folder = entries.file_of(self.results, found["key"], "")
        folder.mkdir(exist_ok=True)
        context = entries.Context(self.is_rehearsal, folder, found["target"])
        # of what it is built from, and not of the rest of the package
        built = self.results / f"built {found['built_from']}"
        if built.is_dir():
            shutil.copytree(built, ROOT / "lm2_kernels", dirs_exist_ok=True)
        elif not self.is_rehearsal and any(PHASES[name].needs_build for name in names):
            build = functools.partial(build_extension, built, found["devices"][-1]["capability"])
            self.build = entries.Child(build, self.results / "build.txt")
            self.build_end = time.time() + _BUILD
        codes, left = [], list(names)
        while left:
            # while the extension is built, what can do without it
            building = self.build is not None and not self.build.wait()
            name = next((n for n in left if not (building and PHASES[n].needs_build)), left[0])
            left.remove(name)
            if PHASES[name].needs_build:
                self.end_build(self.build_end)
            limit = min(PHASES[name].limit, self.end - time.time())
            print(f"--- {name}: {limit:.0f} s at most")
            work = functools.partial(run_phase, context, name, time.time() + limit)
            codes.append(self.do(name, work, limit) if limit > _LEAST else None)
        return int(any(code != 0 for code in codes))

    def do(self, name: str, work: Callable[[], int], limit: float) -> int | None:
        """Do it in a process, and pack meanwhile; returns the exit code."""
        child, end = entries.Child(work), time.time() + limit + _GRACE
        try:
            self._await(child, end)
        finally:
            child.stop(_GRACE)
        if child.code != 0:
            print(f"{name}: exit code {child.code}")
        return child.code

    def _await(self, child: entries.Child, end: float) -> None:
        """Pack what there is until it ends: this process has nothing else to do."""
        self.pack(and_cache=True)
        while not child.wait(max(0.0, min(_PACK, end - time.time()))) and time.time() < end:
            self.pack()

    def end_build(self, end: float) -> None:
        if self.build is not None:
            self._await(self.build, min(self.end, end))
            self.build.stop()
            print(f"the extension's build: exit code {self.build.code}")
            self.build = None

    def pack(self, and_cache: bool = False) -> None:
        # what is written meanwhile may spoil an archive: then the one before it stays
        with contextlib.suppress(OSError):
            if self.folder is not None:
                lines = [f"{name}: {entries.shown(row)}\n" for name, row in self.rows()]
                self._put("summary.txt", "".join([f"{self.folder.name}\n", *lines]).encode())
            self._put(_RESULTS, _archive([self.results], self.results.parent))
            kernels = sorted(self.cache.glob("*"))
            if and_cache and len(kernels) > self.num_cached:
                for index in range(_CACHE_FILES):
                    data = _archive(kernels[index::_CACHE_FILES], self.cache.parent)
                    self._put(f"cache{index}.tar.xz", data)
                self.num_cached = len(kernels)

    def rows(self) -> list[tuple[str, dict]]:
        """All rows with their phases."""
        files = [] if self.folder is None else self.folder.glob("*/*.json")
        found = {file: json.loads(file.read_text()) for file in sorted(files)}
        return [(n, row) for n in PHASES for file, row in found.items() if file.parent.name == n]

    def _put(self, name: str, data: bytes) -> None:
        for place in self.places:
            # one may be full, or gone
            with contextlib.suppress(OSError):
                (place / "part").write_bytes(data)
                (place / "part").replace(place / name)


def _archive(paths: list[Path], root: Path) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz", preset=0) as archive:
        for path in paths:
            archive.add(path, path.relative_to(root))
    return data.getvalue()


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kept = ROOT / "benchmarks" / "results" / "gpu"
    parser.add_argument("--out", type=Path, help="folder that gets the results too")
    parser.add_argument("--sitting", choices=SITTINGS, default="first", help="which phases (first)")
    parser.add_argument("--only", action="append", choices=PHASES, help="a phase; repeatable")
    parser.add_argument("--budget", type=float, help="seconds (those of the sitting)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, interpreted")
    options = parser.parse_args()
    if options.rehearse and options.out is None:
        parser.error("a rehearsal is nothing to go on from: give --out")
    # what is forked ends without a flush
    sys.stdout.reconfigure(line_buffering=True)
    # an exception, so that all that was started is stopped, and what was found is packed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        sitting = SITTINGS[options.sitting]
        places = [] if options.out is None else [options.out.resolve()]
        places += [] if options.rehearse else [kept]
        budget = options.budget or sitting.budget
        programme = Programme([*dict.fromkeys(places)], Path(work), budget, options.rehearse)
        paths = (str(ROOT), os.environ.get("PYTHONPATH"))
        os.environ |= {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "TRITON_CACHE_DIR": str(programme.cache),
            # what forks has no threads, which NumPy would start, and asking whether there is a GPU
            # does not touch it
            "OPENBLAS_NUM_THREADS": "1",
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }
        if options.rehearse:
            os.environ["TRITON_INTERPRET"] = "1"
        sys.path.insert(1, str(ROOT))
        os.chdir(ROOT)
        try:
            return programme.run(dict.fromkeys(options.only or sitting.phases))
        finally:
            # asked to end once more, it would leave half of it
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            programme.end_build(0.0)
            programme.pack(and_cache=True)
            failed = [(name, row) for name, row in programme.rows() if not row["ok"]]
            print("--- what failed:")
            for name, row in failed[-_MOST_SHOWN:]:
                print(f"{name}: {entries.shown(row)}")


if __name__ == "__main__":
    sys.exit(main())
