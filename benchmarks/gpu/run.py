"""The GPU programme: what only an NVIDIA GPU can prove or measure, in sittings of ten minutes.

    python benchmarks/gpu/run.py --out FOLDER                    # the first sitting
    python benchmarks/gpu/run.py --out FOLDER --sitting second   # and what the first left over
    python benchmarks/gpu/run.py --out FOLDER --only sweep       # one phase
    python benchmarks/gpu/run.py --out FOLDER --rehearse         # on a CPU, tiny, interpreted

A bare clone will do. Each phase is a process with a time limit, and so is each of its entries
(``entries.py``). FOLDER gets seven files at most, written again all the time: ``results.tgz``
with a JSON file and a log an entry, all benchmarks as ``bench.json``, and the built extension;
``summary.txt``; Triton's cache. The same command goes on from them, also on another machine of the
same GPU, torch and triton, while lm2_kernels/ and csrc/ are what they were.

Exit code 1 if something failed or was left for want of time, 2 without a GPU.
"""

import argparse
import contextlib
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
import threading
import time
from pathlib import Path
from typing import NamedTuple, TextIO

import entries

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 560.0
_PACK_SECONDS = 20.0
# Triton's cache comes in up to four pieces of so many bytes
_PIECES, _PIECE = 4, 15 * 2**20
# seconds: without which a phase is not begun, to which it may exceed its limit, of the build
_LEAST, _GRACE, _BUILD_SECONDS = 5.0, 10.0, 240.0
_LEFT_OVER = 3  # the exit code of a phase that was out of time


class Phase(NamedTuple):
    module: str
    what: str
    limit: float
    at_once: int = 1
    needs_build: bool = False


PHASES = {
    "smoke": Phase("smoke", "triton", 100, 8),
    "headline": Phase("headline", "plain", 110),
    "attention": Phase("attention", "plain", 90),
    "smoke_cpp": Phase("smoke", "cpp", 60, 8, needs_build=True),
    "suite": Phase("suite", "suite", 130, needs_build=True),
    "big": Phase("suite", "big", 60, needs_build=True),
    "sanitizer": Phase("sanitizer", "sanitizer", 190, needs_build=True),
    "compile": Phase("sweep", "compile", 60, 8),
    "sweep": Phase("sweep", "eight", 150),
    "ncu": Phase("sanitizer", "ncu", 60),
    "graphs": Phase("graphs", "graphs", 60),
    "sweep_one": Phase("sweep", "one", 150),
    "where": Phase("attention", "where", 80),
    "peers": Phase("headline", "peers", 300, needs_build=True),
    "model": Phase("headline", "model", 80, needs_build=True),
}
SITTINGS = {
    "first": ("smoke", "headline", "attention", "smoke_cpp", "suite", "big", "peers"),
    "second": ("smoke", "suite", "big", "sanitizer", "compile", "sweep", "ncu", "graphs"),
    "third": ("smoke", "compile", "sweep_one", "where", "peers", "model", "suite", "big"),
}


def machine(is_rehearsal: bool) -> dict:
    """What results depend on, and by "key" the folder that they are kept in."""
    import torch  # noqa: PLC0415 - the scheduler does without

    from lm2_kernels.backends.triton import launch  # noqa: PLC0415
    from lm2_kernels.bench import suite  # noqa: PLC0415
    from lm2_kernels.version import sources_digest  # noqa: PLC0415

    if not is_rehearsal and not torch.cuda.is_available():
        raise SystemExit(f"it needs an NVIDIA GPU, and torch {torch.__version__} sees none")
    found = suite.machine()
    gpu, versions = found["devices"][-1], found["versions"]
    digests = (sources_digest(ROOT / "lm2_kernels", "*.py"), sources_digest(ROOT / "csrc"))
    key = [gpu["name"], versions["torch"], versions["triton"], *(text[:8] for text in digests)]
    target = launch.target(None if is_rehearsal else 0)
    return found | {"key": " ".join(key), "digests": digests, "target": target}


def inside(options: argparse.Namespace) -> int:
    """A phase's process: it imports what its entries need, and forks them."""
    name, folder, until = options.inside[0], Path(options.inside[1]), float(options.inside[2])
    if name == "machine":
        entries.save(folder / "machine.json", machine(options.rehearse))
        return 0
    phase, record = PHASES[name], entries.load(folder, "machine")
    context = entries.Context(options.rehearse, folder, record, options.tests, options.limit)
    found = importlib.import_module(phase.module).entries(context, phase.what)
    left = entries.run(found, folder / name, until, phase.at_once, options.limit)
    if "headline" in sys.modules:
        sys.modules["headline"].join_reports(folder)
    return _LEFT_OVER if left else 0


class Programme:
    """Runs phases, and packs what there is all the while."""

    def __init__(self, options: argparse.Namespace, work: Path):
        self.options, self.out = options, options.out.resolve()
        self.end = time.time() + options.budget
        self.results, self.cache = work / "results", work / "cache"
        self.cache_size, self.said = 0, []
        self.lock, self.build = threading.Lock(), None
        paths = (str(ROOT), os.environ.get("PYTHONPATH"))
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "TRITON_CACHE_DIR": str(self.cache),
            # a process that only asks whether there is a GPU must not touch it: it forks others
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }
        if options.rehearse:
            self.environment["TRITON_INTERPRET"] = "1"
        self.out.mkdir(parents=True, exist_ok=True)
        for pattern, folder in (("results.tgz", self.results), ("cache.tar.xz.*", self.cache)):
            pieces = sorted((options.earlier or self.out).glob(pattern))
            data = io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))
            try:
                if pieces:
                    with tarfile.open(fileobj=data) as archive:
                        archive.extractall(work, filter="data")
            except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
                # its machine went as it was written: half of it is no use
                shutil.rmtree(folder, ignore_errors=True)
                self.say(f"nothing of {pattern}: {type(error).__name__}")
        self.results.mkdir(exist_ok=True)

    def run(self, phases: tuple[str, ...]) -> int:
        if self.start("machine", self.results, 120.0):
            return 2
        key = json.loads((self.results / "machine.json").read_text(encoding="utf-8"))["key"]
        folder = entries.file_of(self.results, key, "")
        folder.mkdir(exist_ok=True)
        (self.results / "machine.json").replace(folder / "machine.json")
        threading.Thread(target=self.pack_always, daemon=True).start()
        self.start_build(folder)
        codes: dict[str, int] = {}
        while len(codes) < len(phases):
            left = [name for name in phases if name not in codes]
            building = self.build is not None and self.build.poll() is None
            # while the extension is built, what can do without it
            name = next((n for n in left if not (building and PHASES[n].needs_build)), left[0])
            if PHASES[name].needs_build:
                self.end_build(folder)
            limit = max(0.0, min(PHASES[name].limit, self.end - time.time()))
            self.say(f"--- {name}: {limit:.0f} s at most")
            codes[name] = self.start(name, folder, limit) if limit > _LEAST else _LEFT_OVER
            # beside the next phase
            threading.Thread(target=self.pack, args=(True,)).start()
        failed = False
        for name, code in codes.items():
            rows = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{name}/*.json"))]
            good = sum(row["ok"] for row in rows)
            failed = failed or code != 0 or good < len(rows)
            how = {0: "", _LEFT_OVER: ", out of time"}.get(code, f", exit code {code}")
            self.say(f"{name}: {good} of {len(rows)} well{how}")
        return int(failed)

    def say(self, text: str) -> None:
        self.said.append(text)
        print(text, flush=True)

    def start(self, name: str, folder: Path, limit: float) -> int:
        """Run a phase in its process; returns the exit code."""
        command = [sys.executable, __file__, *sys.argv[1:], "--inside", name, str(folder)]
        with (folder / f"{name}.txt").open("w+", encoding="utf-8") as log:
            process = self._popen([*command, repr(time.time() + limit)], log)
            try:
                process.wait(limit + _GRACE)
            except subprocess.TimeoutExpired:
                log.write(f"{name}: stopped\n")
            finally:
                stop(process)
            log.seek(0)
            self.say(log.read().rstrip())
        return process.returncode

    def _popen(self, command: list[str], log: TextIO, **environment: str) -> subprocess.Popen:
        pipes = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        return subprocess.Popen(command, cwd=ROOT, env=self.environment | environment, **pipes)

    def start_build(self, folder: Path) -> None:
        """Build the extension in the background, if an earlier sitting did not."""
        if (folder / "built").is_dir():
            shutil.copytree(folder / "built", ROOT / "lm2_kernels", dirs_exist_ok=True)
        elif not self.options.rehearse:
            gpu = entries.load(folder, "machine")["devices"][-1]
            command = ["nice", sys.executable, "setup.py", "build_ext", "--inplace"]
            with (folder / "build.txt").open("w", encoding="utf-8") as log:
                # half of the cores: the other half launches what is measured
                jobs = {"MAX_JOBS": str(max(1, (os.cpu_count() or 2) // 2))}
                arch = {"TORCH_CUDA_ARCH_LIST": gpu["capability"]}
                self.build = self._popen(command, log, **jobs, **arch)

    def end_build(self, folder: Path) -> None:
        if self.build is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.build.wait(max(0.0, min(_BUILD_SECONDS, self.end - time.time())))
        stop(self.build)
        self.say(f"the extension's build: exit code {self.build.returncode}")
        if self.build.returncode == 0:
            (folder / "built").mkdir()
            for file in (*ROOT.glob("lm2_kernels/*.so"), ROOT / "lm2_kernels" / "_build.json"):
                shutil.copy(file, folder / "built")
        self.build = None

    def pack_always(self) -> None:
        while True:
            time.sleep(_PACK_SECONDS)
            self.pack()

    def pack(self, and_cache: bool = False) -> None:
        # what is written meanwhile may spoil an archive: then the one before it stays
        with self.lock, contextlib.suppress(OSError):
            self._put("summary.txt", "\n".join(self.said).encode())
            self._put("results.tgz", _archive(self.results, "w:gz"))
            size = sum(file.stat().st_size for file in self.cache.rglob("*") if file.is_file())
            if and_cache and size > self.cache_size:
                # seconds, which are well spent only when it has grown
                data = _archive(self.cache, "w:xz", preset=0)
                pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
                for index, piece in enumerate(pieces if len(pieces) <= _PIECES else []):
                    self._put(f"cache.tar.xz.{index}", piece)
                self.cache_size = size

    def _put(self, name: str, data: bytes) -> None:
        (self.out / "part").write_bytes(data)
        (self.out / "part").replace(self.out / name)


def _archive(folder: Path, mode: str, **options: int) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode, **options) as archive:
        archive.add(folder, folder.name)
    return data.getvalue()


def stop(process: subprocess.Popen) -> None:
    """A process and what it started; first it may stop its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(_GRACE)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--earlier", type=Path, help="go on from the files of that folder (--out)")
    parser.add_argument("--sitting", choices=SITTINGS, default="first")
    parser.add_argument("--only", action="append", choices=PHASES, help="a phase; repeatable")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds ({BUDGET:.0f})")
    parser.add_argument("--limit", type=float, help="seconds of an entry, in place of its own")
    parser.add_argument("--tests", default="tests/test_gpu.py", help="the hardware suite's file")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, interpreted")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # an exception, so that all that was started is stopped, and what was found is packed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if options.inside:
        return inside(options)
    with tempfile.TemporaryDirectory() as work:
        programme = Programme(options, Path(work))
        try:
            return programme.run(tuple(dict.fromkeys(options.only or SITTINGS[options.sitting])))
        finally:
            if programme.build is not None:
                stop(programme.build)
            programme.pack(and_cache=True)


if __name__ == "__main__":
    sys.exit(main())
