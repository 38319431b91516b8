"""A fake Triton GPU driver: ordinary ``kernel[grid](...)`` launches on a machine without a GPU.

Every specialisation a wrapper asks for is compiled as on the GPU (same argument binder, same
options, same assembler), its resources are recorded, and its grid and devices are checked. With
``execute=True`` the same launch is then run by Triton's interpreter on the same CPU tensors, so one
test sees both what the compiler makes of a kernel and what the kernel computes.

    with fake_gpu("sm_90") as gpu:
        out = wrapper(x)  # CPU tensors
    assert all(launch.spills == 0 for launch in gpu.launches)

Compilation results are kept per target for the life of the process, and on disk wherever
``TRITON_CACHE_DIR`` points; this module sets no environment variable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import subprocess
import tempfile
import types
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import compiler
from triton.runtime import driver as driver_config
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "SMALL_TARGETS",
    "TARGETS",
    "FakeDriver",
    "Launch",
    "LaunchError",
    "fake_gpu",
    "ptxas_log",
]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# GPUs with little shared memory, for the sweep of every launch configuration
SMALL_TARGETS = {
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
}

# the most shared memory one block may ask for, in bytes
_SHARED_MEMORY_LIMITS = {
    80: 166_912,
    86: 101_376,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    120: 101_376,
    "gfx942": 65_536,
    "gfx950": 163_840,
}

_MAX_GRID = (2**31 - 1, 65_535, 65_535)
_CUOBJDUMP = os.path.join(
    os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump"
)
_PACKAGE_LAUNCHER = "lm2_kernels.backends.triton.launch"

# an instruction starts a line or follows ';' or '{', may be predicated, and is lower case;
# directives start with '.', labels with '$' or end in ':'
_OPCODE = re.compile(r"(?:^|[;{])[ \t]*(?:@!?%\w+[ \t]+)?([a-z][\w.:]*)", re.MULTILINE)
_PTX_PRODUCT = re.compile(r"mma\.|wgmma\.mma|tcgen05\.mma")
_PTX_FLOAT_ATOMIC = re.compile(r"(?:atom|red)\..*\.b?f(?:16|32|64)(?:x2)?\b")
_PTX_BARRIER = re.compile(r"bar(?:rier)?\.(?:cta\.)?sync")
_PTX_ASYNC_COPY = re.compile(r"cp\.async\.(?:c[ag]\.|bulk\.tensor)")
_AMD_FLOAT_ATOMIC = re.compile(r"\w*atomic\w*_(?:pk_)?\w*b?f(?:16|32|64)\b")


class LaunchError(RuntimeError):
    """A launch that a real GPU would refuse."""


class _Device(NamedTuple):
    """What Triton uses as the device key of its caches.

    Holding the target in the key keeps the kernels of different targets, and those of a real
    driver, apart; with a plain index every switch of target would have to empty Triton's caches.
    """

    target: GPUTarget
    index: int


@dataclasses.dataclass(frozen=True)
class _CodeReport:
    registers: int
    spills: int
    f64: int
    tf32: int
    tensor_cores: frozenset[str]
    warpgroup_ptx: str
    atomics: int
    barriers: int
    async_copies: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Function:
    """The fake function handle of one loaded binary."""

    binary: bytes


# by binary and not by function handle, as Triton loads a binary anew for each launch of a kernel
# without a module
_reports: dict[tuple[GPUTarget, bytes], _CodeReport] = {}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    kernel: str
    """Name of the ``@triton.jit`` function."""
    target: str
    """``"cuda:90"``, ``"hip:gfx942"``."""
    signature: dict[str, str]
    """Type of each parameter by name; ``"constexpr"`` for constants, also for arguments that were
    specialised to one (None, and integers equal to 1)."""
    num_warps: int
    num_stages: int | None
    grid: tuple[int, int, int]
    registers: int
    """Registers per thread (vector registers on AMD)."""
    spills: int
    """4-byte words per thread that live in local memory instead of registers."""
    shared: int
    """Shared memory of one block in bytes."""
    devices: frozenset[torch.device]
    f64: int
    """Double precision instructions."""
    tf32: int
    """Reduced precision instructions on fp32 data (tf32 in PTX, xf32 on AMD)."""
    tensor_cores: frozenset[str]
    """Kinds of matrix product instructions: ``"wgmma.mma_async"``."""
    warpgroup_ptx: str = dataclasses.field(repr=False)
    """The PTX of a kernel with products of whole warp groups, for :func:`ptxas_log`; else empty."""
    atomics: int
    """Floating point atomics; integer ones are not counted."""
    barriers: int
    """Instructions at which all warps of a block wait for one another."""
    async_copies: int
    """Copies to shared memory that the kernel goes on beside, whole tiles among them (NVIDIA)."""


_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


class _Launcher:
    """What Triton calls to launch a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source = source
        self.metadata = metadata

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: Any,
        function: _Function,
        packed_metadata: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *args: Any,
    ) -> None:
        # looked up at each call: a compiled kernel outlives the driver that was active when it
        # was first launched
        driver = driver_config.active
        driver.streams.append(stream)
        driver.on_launch(self.source, self.metadata, function, (grid_x, grid_y, grid_z), args)


class FakeDriver(DriverBase):
    """The driver Triton sees inside `fake_gpu`; tests read ``launches``."""

    launcher_cls = _Launcher

    def __init__(self, target: GPUTarget, execute: bool) -> None:
        super().__init__()
        self.target = target
        self.execute = execute
        self.launches: list[Launch] = []
        # of every launch that was compiled
        self.streams: list[int] = []
        # of every launch that was not
        self.grids: list[tuple[int, ...]] = []
        self.current_index = 0
        self.current_stream = 0
        # Triton calls the methods on binaries and device properties through `driver.utils`
        self.utils = self

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> _Device:
        return _Device(self.target, self.current_index)

    def set_current_device(self, device: _Device | int) -> None:
        self.current_index = device.index if isinstance(device, _Device) else device

    def get_current_stream(self, device: _Device) -> int:
        return self.current_stream

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> types.ModuleType:
        return torch.cpu

    def get_device_properties(self, device: _Device) -> dict[str, int]:
        return {
            "max_shared_mem": _SHARED_MEMORY_LIMITS[self.target.arch],
            "max_num_regs": 65_536,
            "multiprocessor_count": 132,
            "warpSize": self.target.warp_size,
        }

    def get_benchmarker(self) -> Any:
        def benchmark(call: Any, quantiles: Any = None, **_: Any) -> list[float]:
            # an autotuner compiles and runs every configuration once, and keeps the first
            call()
            return [1.0] * len(quantiles or (0,))

        return benchmark

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass

    def load_binary(self, name: str, binary: bytes, shared: int, device: _Device) -> tuple:
        max_threads = 1024
        # module None, or a kernel that is garbage collected asks whatever driver is active then
        # to unload it
        return None, _Function(binary), 0, 0, max_threads

    def on_launch(
        self,
        source: Any,
        metadata: Any,
        function: _Function,
        grid: tuple[int, int, int],
        args: tuple,
    ) -> None:
        """Records, checks and, if asked to, executes one launch."""
        report = self._report(source.fn, function)
        tensors = list(_tensors_in(args))
        devices = frozenset(tensor.device for tensor in tensors)
        name = source.fn.fn.__name__
        self.launches.append(
            Launch(
                kernel=name,
                target=f"{self.target.backend}:{self.target.arch}",
                signature=dict(source.signature),
                num_warps=metadata.num_warps,
                num_stages=getattr(metadata, "num_stages", None),
                grid=grid,
                shared=metadata.shared,
                devices=devices,
                **dataclasses.asdict(report),
            )
        )
        self._check_grid(name, grid)
        self._check_devices(name, devices)
        _check_arguments(name, source, args)
        is_real_cpu_launch = all(
            tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor) for tensor in tensors
        )
        if self.execute and is_real_cpu_launch:
            _interpret(source.fn, grid, args)

    def _report(self, jit_function: JITFunction, function: _Function) -> _CodeReport:
        key = (self.target, function.binary)
        if key not in _reports:
            kernels = jit_function.device_caches[self.get_current_device()][0].values()
            asm = next(kernel.asm for kernel in kernels if kernel.function is function)
            if self.target.backend == "cuda":
                _reports[key] = _inspect_cuda(function.binary, asm["ptx"])
            else:
                _reports[key] = _inspect_amd(asm["amdgcn"])
        return _reports[key]

    def _check_grid(self, name: str, grid: tuple[int, int, int]) -> None:
        if any(size < 0 for size in grid):
            raise LaunchError(f"{name}: grid {grid} has a negative size")
        if any(size > limit for size, limit in zip(grid, _MAX_GRID, strict=True)):
            raise LaunchError(f"{name}: grid {grid} exceeds the limit {_MAX_GRID}")

    def _check_devices(self, name: str, devices: frozenset[torch.device]) -> None:
        if len(devices) > 1:
            listed = sorted(str(device) for device in devices)
            raise LaunchError(f"{name}: tensors are on several devices: {listed}")
        for device in devices:
            if device.type == "cuda" and device.index != self.current_index:
                raise LaunchError(
                    f"{name}: tensors are on {device}, but the current device at the launch is "
                    f"cuda:{self.current_index}; guard the launch with torch.cuda.device"
                )


def _check_arguments(name: str, source: Any, args: tuple) -> None:
    """That the arguments are such as the kernel was compiled for."""
    for (place, *inner), constant in source.constants.items():
        if not inner and args[place] != constant:
            raise LaunchError(f"{name}: compiled for {constant!r}, given {args[place]!r}")
    for (place, *inner), attributes in source.attrs.items():
        arg, divisor = args[place], dict(attributes).get("tt.divisibility", 1)
        if inner or arg is None or isinstance(arg, FakeTensor):
            continue
        value = arg.data_ptr() if isinstance(arg, torch.Tensor) else arg
        if isinstance(value, int) and value % divisor:
            raise LaunchError(f"{name}: compiled for multiples of {divisor}, given {value}")
    for (argument, kind), arg in zip(source.signature.items(), args, strict=True):
        bits = {"i32": 32, "i64": 64}.get(kind)
        if bits is not None and not -(1 << bits - 1) <= arg < 1 << bits - 1:
            raise LaunchError(f"{name}: {argument} is compiled as {kind}, given {arg}")
        if isinstance(arg, torch.Tensor) and kind != _POINTERS.get(arg.dtype, kind):
            raise LaunchError(f"{name}: {argument} is compiled as {kind}, given {arg.dtype}")


def _tensors_in(args: Any) -> Iterator[torch.Tensor]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, TensorDescriptor):
            yield arg.base
        elif isinstance(arg, (tuple, list)):
            yield from _tensors_in(arg)


def _inspect_cuda(cubin: bytes, ptx: str) -> _CodeReport:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_CUOBJDUMP, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    registers, stack_bytes, local_bytes = (int(number) for number in match.groups())
    opcodes = _OPCODE.findall(ptx)
    return _CodeReport(
        registers=registers,
        # ptxas keeps what it spills in the stack frame
        spills=(stack_bytes + local_bytes) // 4,
        f64=sum(".f64" in opcode for opcode in opcodes),
        tf32=sum("tf32" in opcode for opcode in opcodes),
        tensor_cores=_kinds(opcode for opcode in opcodes if _PTX_PRODUCT.match(opcode)),
        warpgroup_ptx=ptx if "wgmma.mma_async" in ptx else "",
        atomics=sum(bool(_PTX_FLOAT_ATOMIC.match(opcode)) for opcode in opcodes),
        barriers=sum(bool(_PTX_BARRIER.match(opcode)) for opcode in opcodes),
        async_copies=sum(bool(_PTX_ASYNC_COPY.match(opcode)) for opcode in opcodes),
    )


def _kinds(opcodes: Iterator[str]) -> frozenset[str]:
    """The first two parts of each: ``mma.sync``, ``v_mfma_f32_32x32x8_bf16``."""
    return frozenset(".".join(opcode.split(".")[:2]) for opcode in opcodes)


def ptxas_log(ptx: str, arch: str) -> str:
    """What the assembler says of a kernel, its warnings too, under Triton's options."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        # releases differ in which assembler serves which generation
        ptxas = compiler.get_ptxas(int(arch.removeprefix("sm_").rstrip("a"))).path
        command = [ptxas, "-v", "-lineinfo", "--regAllocOptLevel=2"]
        command += [f"--gpu-name={arch}", file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _inspect_amd(amdgcn: str) -> _CodeReport:
    def metadata(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", amdgcn)[1])

    opcodes = _OPCODE.findall(amdgcn)
    return _CodeReport(
        registers=metadata("vgpr_count"),
        # scalar registers spill to vector registers, not to memory
        spills=metadata("vgpr_spill_count"),
        f64=sum(opcode.startswith("v_") and "_f64" in opcode for opcode in opcodes),
        tf32=sum("xf32" in opcode for opcode in opcodes),
        tensor_cores=_kinds(opcode for opcode in opcodes if "mfma" in opcode),
        warpgroup_ptx="",
        atomics=sum(bool(_AMD_FLOAT_ATOMIC.match(opcode)) for opcode in opcodes),
        barriers=opcodes.count("s_barrier"),
        async_copies=0,
    )


def _interpreted(jit_function: JITFunction) -> interpreter.InterpretedFunction:
    # kept on the function: building it parses the source
    if not hasattr(jit_function, "_fake_gpu_interpreted"):
        jit_function._fake_gpu_interpreted = interpreter.InterpretedFunction(jit_function.fn)
    return jit_function._fake_gpu_interpreted


# the interpreter patches those language modules that it finds in the globals of the function it is
# given; a kernel sees only `tl`, but the library's own helpers (tl.sum, tl.cumsum) use `tl.core`
_SEES_BOTH_MODULES = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})


def _with_index(patch_lang_tensor: Any) -> Any:
    """``int`` of a scalar in interpreted code: Triton 3.6 has an array of one element there, which
    NumPy refuses from 2.4 on.
    """

    def patch(tensor: type, scope: Any) -> None:
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch


def _interpret(jit_function: JITFunction, grid: Any, args: tuple, **constants: Any) -> None:
    scope = interpreter._patch_lang(_SEES_BOTH_MODULES)
    try:
        _interpreted(jit_function).run(*args, grid=grid, warmup=False, **constants)
    finally:
        scope.restore()


def _call_jit_helper(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    """Replaces ``JITFunction.__call__``: a ``@triton.jit`` helper called by interpreted code.

    The interpreter's own way of calling a helper patches the language again at each call and
    leaves it patched, which breaks the next compilation of the process.
    """
    return _interpreted(self).rewrite()(*args, **kwargs)


def _make_device_guard(driver: FakeDriver) -> type:
    """Returns a stand-in for ``torch.cuda.device`` that only moves the driver's current device."""

    class DeviceGuard:
        def __init__(self, device: Any) -> None:
            if device is None or isinstance(device, int):
                self.index = device
            else:
                device = torch.device(device)
                self.index = device.index if device.type == "cuda" else None

        def __enter__(self) -> None:
            self.previous = driver.current_index
            if self.index is not None and self.index >= 0:
                driver.current_index = self.index

        def __exit__(self, *exc_info: object) -> None:
            driver.current_index = self.previous

    return DeviceGuard


@contextlib.contextmanager
def _cpu_launches_allowed() -> Iterator[None]:
    """Lets the package's Triton backend accept CPU tensors, and forget the target it has cached,
    and what it has launched there."""
    try:
        launcher = importlib.import_module(_PACKAGE_LAUNCHER)
    except ImportError:
        # the tool also serves kernels that are not the package's
        yield
        return

    def forget_target() -> None:
        for name in ("target", "driver_reason"):
            getattr(getattr(launcher, name, None), "cache_clear", lambda: None)()
        getattr(launcher, "forget", lambda: None)()

    forget_target()
    try:
        with mock.patch.dict(launcher.DEVICES, cpu="CPUs"):
            yield
    finally:
        forget_target()


def _run_interpreted(
    self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any
) -> None:
    """Replaces ``JITFunction.run``: a launch that is interpreted without having been compiled."""
    driver = driver_config.active
    driver.grids.append(grid)
    if driver.execute:
        constants = {name: value for name, value in options.items() if name in self.arg_names}
        _interpret(self, grid, args, **constants)


@contextlib.contextmanager
def fake_gpu(
    target: GPUTarget | str = TARGETS["sm_90"], *, execute: bool = True, compile: bool = True
) -> Iterator[FakeDriver]:
    """Makes Triton compile for `target` and, if `execute`, interpret each launch on its tensors.

    Args:
        target: A target, or its name in `TARGETS` or `SMALL_TARGETS`.
        execute: Whether to run the kernels too. Launches on fake tensors are only ever compiled.
        compile: Whether to compile them. Else they are interpreted alone, in a tenth of the time;
            of a launch its grid is recorded, which must be a tuple.

    Yields:
        The driver; its ``launches`` are in launch order.

    Raises:
        LaunchError: From a launch whose grid or devices a real GPU would refuse.
        triton.runtime.errors.OutOfResources: As on a real GPU.
    """
    if isinstance(target, str):
        target = {**TARGETS, **SMALL_TARGETS}[target]
    driver = FakeDriver(target, execute)
    with contextlib.ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        # `_active`, because reading `active` would look for a real driver
        patch(driver_config, "_active", driver)
        patch(JITFunction, "__call__", _call_jit_helper)
        if not compile:
            patch(JITFunction, "run", _run_interpreted)
        builder = interpreter.interpreter_builder
        # without debug mode the interpreter computes its overflow checks, a third of its time,
        # and ignores them
        options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
        patch(builder, "options", options)
        patch(interpreter, "_patch_lang_tensor", _with_index(interpreter._patch_lang_tensor))
        patch(torch.cuda, "device", _make_device_guard(driver))
        patch(torch.cuda, "current_device", lambda: driver.current_index)
        stack.enter_context(_cpu_launches_allowed())
        yield driver
