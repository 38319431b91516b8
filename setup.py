"""Builds the compiled parts, `_C` (CPU) and `_cuda`; everything else is in pyproject.toml.

What cannot be built is left out with one clear line, which `python -m lm2_kernels info` repeats;
the package runs without. LM2_KERNELS_BUILD is "auto", "none" (pure Python), "cpu" (fail without
C++, no CUDA) or "cuda" (fail without both); FORCE_CUDA=1 is "cuda", FORCE_CUDA=0 leaves CUDA out.
"""

import glob
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

# the stable ABI of torch 2.11: what is built against a newer one loads in 2.11 too
TORCH_TARGET = "0x020B000000000000ULL"
MINIMUM_TORCH = (2, 11)
OLDEST_ARCH = (7, 5)
DEFAULT_ARCHS = "7.5;8.0;9.0;10.0;12.0+PTX"
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    # what stands between the loops and SIMD; results and the floating-point state stay as they are
    "-fno-math-errno",
    "-fno-trapping-math",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]
CHOICES = ("auto", "none", "cpu", "cuda")
PARTS = {"lm2_kernels._C": "cpu", "lm2_kernels._cuda": "cuda"}


class LeftOutError(Exception):
    """Why a part is not built."""


def say(text: str) -> None:
    print(f"lm2_kernels: {text}", file=sys.stderr, flush=True)


def required() -> str:
    """What must be built: "auto", "none", "cpu" or "cuda"."""
    choice = os.environ.get("LM2_KERNELS_BUILD") or "auto"
    if choice not in CHOICES:
        raise SystemExit(f"lm2_kernels: LM2_KERNELS_BUILD must be one of {CHOICES}, got {choice!r}")
    return "cuda" if os.environ.get("FORCE_CUDA") == "1" else choice


def import_torch():
    """torch, pybind11 and torch's builder, if they fit."""
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        raise LeftOutError(
            f"no module {error.name!r} in {sys.executable} (with --no-build-isolation, install "
            f"torch, setuptools, pybind11 and ninja first)"
        ) from None
    except ImportError as error:
        raise LeftOutError(f"the installed torch does not import: {error}") from None
    version = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
    if version < MINIMUM_TORCH:
        raise LeftOutError(f"torch {torch.__version__} is older than 2.11")
    return torch, pybind11, cpp_extension


def check_compiler() -> None:
    """A C++20 compiler that finds Python's headers."""
    # one program, without arguments: that is how torch's builder starts it
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <Python.h>\n#include <concepts>\nint main() { return 0; }\n")
        include = f"-I{sysconfig.get_paths()['include']}"
        command = [compiler, "-std=c++20", include, "-c", str(source), "-o", f"{source}.o"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            raise LeftOutError(f"no C++ compiler: '{compiler}' does not start") from None
    if answer.returncode:
        first = next((line for line in answer.stderr.splitlines() if "error" in line), "it failed")
        raise LeftOutError(f"'{compiler}' does not compile C++20: {first.strip()}")


def cuda_include(home: str) -> str | None:
    """Where a toolkit has its headers; conda's are below targets/."""
    folders = [f"{home}/include", *sorted(glob.glob(f"{home}/targets/*/include"))]
    return next((f for f in folders if Path(f, "cuda_runtime.h").exists()), None)


def toolkit() -> str | None:
    """The root of a CUDA toolkit that has both nvcc and its headers, or None."""
    nvcc = shutil.which("nvcc")
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    roots = [chosen, nvcc and str(Path(nvcc).resolve().parent.parent), "/usr/local/cuda"]
    for root in filter(None, roots):
        if Path(root, "bin/nvcc").exists() and cuda_include(root):
            return root
        if root == chosen:
            say(f"{root} has no bin/nvcc or no cuda_runtime.h: looking elsewhere")
    return None


def ask_nvcc(home: str, option: str) -> str:
    try:
        return subprocess.run(
            [f"{home}/bin/nvcc", option], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise LeftOutError(f"{home}/bin/nvcc does not run: {error}") from None


def nvcc_version(home: str) -> str:
    match = re.search(r"release (\d+\.\d+)", ask_nvcc(home, "--version"))
    if match is None:
        raise LeftOutError(f"{home}/bin/nvcc --version names no release")
    return match.group(1)


def cuda_toolkit(torch) -> str:
    """The toolkit to build the CUDA kernels with; LeftOutError says why there is none."""
    if os.environ.get("FORCE_CUDA") == "0":
        raise LeftOutError("FORCE_CUDA=0")
    if required() == "cpu":
        raise LeftOutError("LM2_KERNELS_BUILD=cpu")
    home = toolkit()
    if home is None:
        raise LeftOutError("no CUDA toolkit (set CUDA_HOME, or put nvcc on PATH)")
    if torch.version.cuda is None:
        # forced, it builds and loads all the same: that is how it is tested without a GPU
        if required() == "cuda":
            return home
        raise LeftOutError(f"torch {torch.__version__} is a build without CUDA")
    version = nvcc_version(home)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise LeftOutError(
            f"nvcc is {version} ({home}) and torch is built for CUDA {torch.version.cuda}: their "
            f"major versions must agree"
        )
    return home


def split_archs(text: str, known: set[str]) -> tuple[list[str], list[str]]:
    """Nvcc's flags for a TORCH_CUDA_ARCH_LIST, and the entries that this nvcc knows."""
    flags, names = [], []
    for entry in filter(None, re.split(r"[;, ]+", text)):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if match is None:
            raise LeftOutError(
                f"TORCH_CUDA_ARCH_LIST has {entry!r}, which is not like 8.0, 9.0a or 12.0+PTX"
            )
        major, minor, suffix, ptx = match.groups()
        if (int(major), int(minor)) < OLDEST_ARCH:
            say(f"CUDA kernels need sm_75 or newer: sm_{major}{minor} left out")
            continue
        if f"compute_{major}{minor}" not in known:
            say(f"CUDA kernels: this nvcc does not know sm_{major}{minor}: left out")
            continue
        number = f"{major}{minor}{suffix}"
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        names.append(entry)
    return flags, names


def cuda_archs(torch, home: str) -> tuple[list[str], list[str]]:
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not wanted and torch.cuda.is_available():
        try:
            count = torch.cuda.device_count()
            visible = {torch.cuda.get_device_capability(index) for index in range(count)}
        except RuntimeError as error:
            raise LeftOutError(f"the GPU does not answer: {error}") from None
        wanted = ";".join(f"{major}.{minor}" for major, minor in sorted(visible))
    known = set(ask_nvcc(home, "--list-gpu-arch").split())
    flags, names = split_archs(wanted or DEFAULT_ARCHS, known)
    if not flags:
        raise LeftOutError(f"they can be built for none of {wanted or DEFAULT_ARCHS}")
    return flags, names


def cpu_extension(pybind11, cpp_extension) -> Extension:
    return Extension(
        "lm2_kernels._C",
        ["csrc/module.cpp", "csrc/ops.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))],
        depends=glob.glob("csrc/**/*.h", recursive=True),
        include_dirs=[pybind11.get_include(), *cpp_extension.include_paths()[:1]],
        library_dirs=[cpp_extension.TORCH_LIB_PATH],
        libraries=["torch_cpu"],
        language="c++",
        extra_compile_args={"cxx": CXX_FLAGS},
    )


def cuda_extension(torch, cpp_extension, record: dict) -> Extension:
    home = cuda_toolkit(torch)
    flags, names = cuda_archs(torch, home)
    record |= {"nvcc": nvcc_version(home), "cuda_archs": names}
    say(f"CUDA kernels: nvcc {record['nvcc']} ({home}) for {' '.join(names)}")
    # torch's own guess is None with a CPU build, and wrong where nvcc on PATH is a wrapper script
    cpp_extension.CUDA_HOME = home
    folders = [f"{home}/lib64", f"{home}/lib", *glob.glob(f"{home}/targets/*/lib")]
    nvcc = [
        "-O3",
        "-std=c++20",
        "--expt-relaxed-constexpr",
        "-Xcompiler",
        "-fvisibility=hidden",
        *flags,
    ]
    # torch hands nvcc CC alone
    if os.environ.get("CXX") and not os.environ.get("CC"):
        nvcc += ["-ccbin", os.environ["CXX"]]
    if os.environ.get("NVCC_THREADS"):
        nvcc += ["--threads", os.environ["NVCC_THREADS"]]
    return Extension(
        "lm2_kernels._cuda",
        ["csrc/cuda/bindings.cpp", *sorted(glob.glob("csrc/cuda/*.cu"))],
        depends=glob.glob("csrc/**/*.h", recursive=True),
        include_dirs=[*cpp_extension.include_paths()[:1], cuda_include(home)],
        library_dirs=[cpp_extension.TORCH_LIB_PATH, *filter(os.path.isdir, folders)],
        # libtorch_cuda is found at run time: the library loads in every torch
        libraries=["torch_cpu", "cudart_static", "rt", "dl", "pthread"],
        language="c++",
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": nvcc},
        extra_link_args=["-Wl,--no-undefined"],
    )


def plan() -> tuple[list[Extension], dict, dict]:
    """The extensions to build, their command class, and the record of what was decided."""
    record: dict = {"cpu": None, "cuda": None}
    extensions: list[Extension] = []
    need = required()
    if need == "none":
        record = {"cpu": "LM2_KERNELS_BUILD=none", "cuda": "LM2_KERNELS_BUILD=none"}
        return [], {}, record
    try:
        torch, pybind11, cpp_extension = import_torch()
        check_compiler()
        extensions.append(cpu_extension(pybind11, cpp_extension))
    except LeftOutError as reason:
        if need in ("cpu", "cuda"):
            raise SystemExit(f"lm2_kernels: C++ is required, but {reason}") from None
        say(f"compiled kernels are left out: {reason}. The package installs and runs without")
        return [], {}, {"cpu": str(reason), "cuda": str(reason)}
    try:
        extensions.append(cuda_extension(torch, cpp_extension, record))
    except LeftOutError as reason:
        if need == "cuda":
            raise SystemExit(f"lm2_kernels: CUDA kernels are required, but {reason}") from None
        say(f"CUDA kernels are left out: {reason}. Everything else is installed")
        record["cuda"] = str(reason)
    return extensions, {"build_ext": builder(cpp_extension, record)}, record


def builder(cpp_extension, record: dict):
    class build_ext(cpp_extension.BuildExtension):  # noqa: N801 - a command's name
        def run(self):
            super().run()
            write_record(Path("." if self.inplace else self.build_lib, "lm2_kernels"), record)

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                # torch's own checks, of what nvcc and the compiler go with: before it builds any
                cuda = next((e for e in self.extensions if PARTS[e.name] == "cuda"), None)
                if cuda is None:
                    raise
                self.leave_out(cuda, error)
                super().build_extensions()

        def build_extension(self, ext):
            try:
                super().build_extension(ext)
            except Exception as error:
                self.leave_out(ext, error)

        def leave_out(self, ext, error):
            part = PARTS[ext.name]
            if required() in ("cuda", part):
                raise error
            reason = f"they do not compile here; LM2_KERNELS_BUILD={part} pip install -v shows why"
            say(f"{part} kernels are left out: {reason} ({' '.join(str(error).split())})")
            record[part] = reason
            # so that nobody looks for its library
            self.extensions = [other for other in self.extensions if other is not ext]

    return build_ext


def write_record(package: Path, record: dict) -> None:
    """Say what is here, and take away what an earlier build left of a part that is not."""
    digest = runpy.run_path("lm2_kernels/version.py")["sources_digest"](Path("csrc"))
    record = record | {"sources": digest}
    for name, part in PARTS.items():
        if record[part] is not None:
            for library in package.glob(f"{name.split('.')[1]}.*"):
                library.unlink()
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def python_builder(record: dict):
    class build_record(build_py):  # noqa: N801 - a command's name
        def run(self):
            super().run()
            inplace = self.editable_mode
            write_record(Path("." if inplace else self.build_lib, "lm2_kernels"), record)

    return build_record


# these hooks run without torch
METADATA_ONLY = {"egg_info", "dist_info", "sdist", "clean", "--version", "--name"}

if __name__ == "__main__":
    if METADATA_ONLY & set(sys.argv):
        setup()
    else:
        extensions, commands, record = plan()
        setup(ext_modules=extensions, cmdclass={**commands, "build_py": python_builder(record)})
