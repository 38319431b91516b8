"""The backends: one contract (:mod:`lm2_kernels.backends.contract`), several implementations, and
the choice between them.

Backends never import one another. What two of them share lives in
:mod:`lm2_kernels.backends.composite` and :mod:`lm2_kernels.backends.dropout`.
"""

import contextlib
import importlib
import itertools
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from lm2_kernels.backends.contract import OPS

# in the order of preference; register adds to it
NAMES: tuple[str, ...] = ("triton", "cpp", "eager")
ENVIRONMENT_VARIABLE = "LM2_KERNELS_BACKEND"

_BUILT_IN = NAMES
# how often a backend came or went: what was chosen before may be another by now
revision = 0
# modules, and the objects that were registered
_modules: dict[str, Any] = {}
_import_errors: dict[str, str] = {}
# of the process, for what no use_backend is in force
_default = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
# by identity, as two recordings may hold equal lists
_recordings: dict[int, list[tuple[str, str]]] = {}
_warned: set[tuple[str, str]] = set()


def constant_when_compiled(function: Callable) -> Callable:
    """Have torch.compile call ``function`` once and take its result as a constant.

    What ``torch.compiler.assume_constant_result`` does, without importing torch._dynamo (seconds,
    and Triton with it) into every process that imports this package.
    """
    function._dynamo_marked_constant = True
    return function


@constant_when_compiled
def _load(name: str) -> str | None:
    """Import a backend once. Returns why it cannot be imported, or None."""
    if name not in NAMES:
        return "it is not registered"
    if name not in _modules and name not in _import_errors:
        try:
            _modules[name] = importlib.import_module(f"{__name__}.{name}")
        except ImportError as error:
            _import_errors[name] = f"it does not import: {error}"
    return _import_errors.get(name)


@constant_when_compiled
def _load_all() -> None:
    for name in NAMES:
        _load(name)


def get(name: str) -> Any:
    """The backend's module, or the object that was registered.

    Raises:
        RuntimeError: there is none, or it cannot be imported; the text says why.
    """
    reason = _load(name)
    if reason is not None:
        raise RuntimeError(f"backend '{name}' is not available: {reason}")
    return _modules[name]


def unsupported_reason(name: str, op: str, *tensors: Tensor) -> str | None:
    """Why backend ``name`` cannot run ``op`` on these tensors, or None if it can."""
    reason = _load(name)
    if reason is not None:
        return reason
    backend = _modules[name]
    if not hasattr(backend, f"{op}_forward"):
        return f"it has no {op}"
    if tensors and backend.DEVICES is not None:
        device_type = tensors[0].device.type
        if device_type not in backend.DEVICES:
            devices = " and ".join(backend.DEVICES.values())
            return f"the tensors are on {device_type}, it runs on {devices}"
    return backend.unsupported_reason(op, *tensors)


def check_choice(backend: str, source: str = "backend") -> None:
    """Raise ValueError, naming its source, unless ``backend`` is a known name or "auto"."""
    choices = (*NAMES, "auto")
    if backend not in choices:
        names = ", ".join(f"'{name}'" for name in choices)
        raise ValueError(f"{source} must be one of {names}, got {backend!r}")


class register:  # noqa: N801 - used like a function, as use_backend is
    """Add a backend of your own, until the ``with`` block ends or for good.

    It is chosen as the package's own are: by name, by :class:`use_backend` and by "auto", in
    compiled graphs too; ``info`` and ``verify`` list it.

    Args:
        name: what ``backend=`` takes.
        backend: a module, or another object, with what
            :mod:`lm2_kernels.backends.contract` names, for all ops or some.
        before: the backend that "auto" asks next where this one refuses; unless given it is asked
            first of all.

    Raises:
        ValueError: the name is taken or no identifier, or ``before`` is unknown.
        TypeError: the object lacks something; the text lists what.
    """

    def __init__(self, name: str, backend: object, *, before: str | None = None):
        global NAMES, revision
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f"register: the name must be an identifier, got {name!r}")
        if name in (*NAMES, "auto"):
            raise ValueError(f"register: there is a backend '{name}' already")
        if before is not None and before not in NAMES:
            raise ValueError(f"register: before must be one of {NAMES}, got {before!r}")
        has = {op for op in OPS if callable(getattr(backend, f"{op}_forward", None))}
        functions = ["unsupported_reason", *(f"{op}_backward" for op in OPS if op in has)]
        missing = [item for item in functions if not callable(getattr(backend, item, None))]
        if not has:
            missing.append(f"every op, as {OPS[0]}_forward")
        devices = getattr(backend, "DEVICES", 0)
        if not isinstance(devices, Mapping | None) or devices == {}:
            missing.append("DEVICES (a dict, or None)")
        if missing:
            raise TypeError(
                f"register: backend '{name}' lacks {', '.join(missing)}; see "
                f"lm2_kernels.backends.contract"
            )
        place = 0 if before is None else NAMES.index(before)
        _modules[name] = backend
        NAMES = (*NAMES[:place], name, *NAMES[place:])
        revision += 1
        self._name, self._backend = name, backend

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception) -> None:
        # somebody may have taken it out, or another in under its name
        if _modules.get(self._name) is self._backend:
            unregister(self._name)


def unregister(name: str) -> None:
    """Take out a backend that :class:`register` added; if it is the default, "auto" is from now on.

    Raises:
        ValueError: no such backend was registered.
    """
    global NAMES, _default, revision
    if name not in NAMES or name in _BUILT_IN:
        raise ValueError(f"unregister: there is no registered backend {name!r}")
    NAMES = tuple(other for other in NAMES if other != name)
    del _modules[name]
    revision += 1
    if _default == name:
        _default = "auto"


@constant_when_compiled
def _has_autocast(device_type: str) -> bool:
    # asking whether it is enabled raises on a device without it (meta)
    return torch.amp.is_autocast_available(device_type)


# for every call; not filled later, as torch.compile takes a dict to stay what it was
_HAS_AUTOCAST = {device_type: _has_autocast(device_type) for device_type in ("cpu", "cuda")}


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast in force on this type of device, or None."""
    available = _HAS_AUTOCAST.get(device_type)
    if available is None:
        available = _has_autocast(device_type)
    if available and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def computed_dtype(tensor: Tensor) -> torch.dtype:
    """What an operand of a matrix product is computed in: under autocast its dtype, as in torch.

    float64 stays float64 there.
    """
    dtype = autocast_dtype(tensor.device.type)
    return tensor.dtype if dtype is None or tensor.dtype == torch.float64 else dtype


def select(op: str, tensors: tuple[Tensor, ...], backend: str | None = None) -> str:
    """The backend for this call: the argument, else the default, else the first that can.

    ``tensors`` are those that the backend will be given: an autocast's casts come before.
    The default is what :class:`use_backend` set, else the environment variable
    ``LM2_KERNELS_BACKEND``, else "auto".

    Raises:
        ValueError: the name is unknown.
        RuntimeError: a backend asked for by name cannot run this call; the text says why.
    """
    request = requested_backend() if backend is None else backend
    # use_backend has checked its own: a bad default comes from the environment
    check_choice(request, f"{op}: {ENVIRONMENT_VARIABLE if backend is None else 'backend'}")
    if torch.compiler.is_compiling():
        # torch.compile reads the dict of modules once, so it must be complete by then
        _load_all()
    if request != "auto":
        reason = unsupported_reason(request, op, *tensors)
        if reason is not None:
            raise RuntimeError(
                f"{op}: backend '{request}' cannot run this call: {reason}. "
                f"Use backend='auto' or another backend"
            )
        return request
    for name in NAMES:
        if name == "triton" and tensors[0].device.type == "cpu":
            # its interpreter is slow: only for those who ask for it by name
            continue
        reason = unsupported_reason(name, op, *tensors)
        if reason is None:
            return name
        is_accelerator = tensors[0].device.type != "cpu"
        if is_accelerator and not torch.compiler.is_compiling():
            _warn_once(op, f"backend '{name}' is not used on {tensors[0].device.type}: {reason}")
    raise RuntimeError(f"{op}: no backend can run this call: {reason}")


def _warn_once(op: str, text: str) -> None:
    if (op, text) not in _warned:
        _warned.add((op, text))
        warnings.warn(f"{op}: {text}", stacklevel=3)


def call(name: str, function: str, *args):
    """Run ``<op>_forward`` or ``<op>_backward`` of a backend, and record that it ran."""
    for arg in args:
        # the gradient of an output that was not used is None
        if isinstance(arg, Tensor):
            device = arg.device.type
            break
    # the op has its dtypes by now: autocast must not touch a backend's own arithmetic
    return without_autocast(device, call_without_autocast, name, function, *args)


def without_autocast(device_type: str, function: Callable, *args):
    """``function(*args)``, out of the autocast in force on this type of device, if one is."""
    if autocast_dtype(device_type) is None:
        return function(*args)
    with torch.autocast(device_type, enabled=False):
        return function(*args)


def call_without_autocast(name: str, function: str, *args):
    """:func:`call` where no autocast is in force.

    While a mode watches PyTorch's operators (it counts or records them, or fakes tensors), Triton's
    kernels, which are none, are called by ours: they cannot run on what has no memory.
    """
    if name == "triton" and torch._C._len_torch_dispatch_stack() > 0:
        return getattr(torch.ops.lm2_kernels, function)(*args, name)
    if _recordings:
        record(function, name)
    module = _modules.get(name)
    return getattr(get(name) if module is None else module, function)(*args)


def is_recording() -> bool:
    """Whether a :func:`recording` is open."""
    return bool(_recordings)


def record(function: str, name: str) -> None:
    """Note in every open :func:`recording` that ``name`` ran ``function``."""
    for recorded in tuple(_recordings.values()):
        recorded.append((function, name))


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[str, str]]]:
    """Collect ``(function, backend)`` for every backend call made in the block.

    By any thread, as autograd runs a GPU's backward in threads of its own. A call that triton or
    cpp hands to the composite path is followed by a second entry with the backend's name and
    ``/composite``, one that triton hands to a kernel of PyTorch by one with ``/cudnn`` or
    ``/flash``.
    """
    recorded: list[tuple[str, str]] = []
    _recordings[id(recorded)] = recorded
    try:
        yield recorded
    finally:
        del _recordings[id(recorded)]


# backend -> a number, and backends -> what stands for them
_numbers: dict[str, int] = {}
_next_number = itertools.count()
_marks: dict[tuple[str, ...], Tensor] = {}


def mark(names: tuple[str, ...]) -> Tensor:
    """An empty tensor whose shape stands for these backends, to be kept beside what they made.

    What one makes no other need understand. Checkpointing has it made again in backward, perhaps by
    others, and refuses tensors of another shape; who does not let it is told by
    :func:`check_mark`.
    """
    is_watched = torch._C._len_torch_dispatch_stack() > 0
    # what a mode makes is of use to it alone
    made = None if is_watched else _marks.get(names)
    if made is None:
        numbers = [_numbers.setdefault(name, next(_next_number)) for name in names]
        with torch.inference_mode(False):
            made = torch.empty(0, *numbers, dtype=torch.uint8, device="cpu")
        if not is_watched:
            _marks[names] = made
    return made


def check_mark(op: str, made_by: Tensor, names: tuple[str, ...]) -> None:
    """Refuse what was made by others than these."""
    if made_by is _marks.get(names):
        return
    numbers = tuple(_numbers[name] for name in names)
    if made_by.shape[1:] != numbers:
        known = {number: name for name, number in _numbers.items()}
        others = tuple(known.get(number, "?") for number in made_by.shape[1:])
        raise RuntimeError(
            f"{op}: what its forward on {names} kept was made again by {others}; call backward "
            f"with the same use_backend in force, or give the layers a backend"
        )


# what use_backend has set in this thread or task: whose __exit__ undoes it, and the name; the last
# one is in force
_Settings = tuple[tuple[weakref.ref, str], ...]
_settings: ContextVar[_Settings] = ContextVar("settings")
_in_force: ContextVar[str] = ContextVar("in_force")
# the same inside of a function that torch.compile traces, which cannot set a ContextVar
_traced: tuple[str, ...] = ()


def _of_callers_context() -> str:
    """What is in force where a backward was asked for, of which this thread runs a part.

    Autograd has threads of its own for a GPU, where checkpointing calls layers again. From 2.12 on
    PyTorch takes the caller's context along; private to it, and without it nothing is known.
    """
    context = _get_of_tls("context") if _is_in_tls("context") else None
    return "" if context is None else context.get(_in_force, "")


_graph_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_is_in_tls = getattr(torch._C, "_is_key_in_tls", lambda key: False)
_get_of_tls = getattr(torch._C, "_get_obj_in_tls", lambda key: None)


class _Context:
    # torch.compile cannot trace ContextVar.get, but reads, and guards on, a property whose function
    # is a builtin, whatever that calls
    in_force = property(repr)

    def __repr__(self) -> str:
        name = _in_force.get("")
        # in a backward, where nobody has set one in this thread
        return name if name or _graph_task() == -1 else _of_callers_context()


_context = _Context()

# Dynamo compiles a function of its own that names the module torch, and passes over one that has no
# tensor and does not. So use_backend's must not: after a graph break in its block, which has the
# function around it run uncompiled, all three set the ContextVar then. Compiled one by one they
# did not agree: a frame past the limit of recompilations is not compiled, nor is an __init__ that
# Python 3.13 enters by itself (CALL_ALLOC_AND_ENTER_INIT).
_is_compiling = torch.compiler.is_compiling


class use_backend:  # noqa: N801 - used like a function, as torch.no_grad is
    """Set the default backend of this thread or asyncio task, until the ``with`` block ends.

    ``use_backend("eager")`` alone sets it for good, or until the ``with use_backend`` around it
    ends; in a function that torch.compile traces it does nothing. A new thread starts with the
    process's default: the environment variable ``LM2_KERNELS_BACKEND``, else ``"auto"``, which
    takes the first backend that can run each call. A generator's block holds for its caller too
    while it waits, as that of ``torch.no_grad`` does.

    A backward runs where its forward ran, whatever thread autograd takes for it. What
    ``torch.utils.checkpoint`` computes again in backward runs on what is in force for the caller of
    backward; with PyTorch 2.11, on a GPU, on the process's default. Where that is another backend
    than before, a CheckpointError says that a tensor has another shape: set the environment
    variable, or the layers' ``backend``. Code that torch.compile compiled inside of a checkpoint
    does not know who made what it kept: call backward with the same setting in force.

    Raises:
        ValueError: the name is unknown.
    """

    def __init__(self, backend: str):
        check_choice(backend)
        self._backend = backend
        if not _is_compiling():
            _set((*_settings.get(()), (weakref.ref(self), backend)))

    def __enter__(self) -> None:
        global _traced
        if _is_compiling():
            _traced = (*_traced, self._backend)
            return
        settings = _settings.get(())
        if not any(setter() is self for setter, _ in settings):
            # entered a second time, or in another thread than it was made in
            _set((*settings, (weakref.ref(self), self._backend)))

    def __exit__(self, *exception: object) -> None:
        global _traced
        if _is_compiling():
            _traced = _traced[:-1]
            return
        settings = _settings.get(())
        place = next((i for i, (setter, _) in enumerate(settings) if setter() is self), None)
        if place is not None:
            # with those that were set in the block and have nobody left to undo them
            later = (setting for setting in settings[place + 1 :] if setting[0]() is not None)
            _set((*settings[:place], *later))


def _set(settings: _Settings) -> None:
    # of neighbours that nobody can undo only the last one counts
    settings = tuple(
        setting
        for setting, after in itertools.zip_longest(settings, settings[1:])
        if after is None or setting[0]() is not None or after[0]() is not None
    )
    _settings.set(settings)
    _in_force.set(settings[-1][1] if settings else "")


def requested_backend() -> str:
    """The default backend in force: a backend's name or "auto"."""
    name = _context.in_force
    if torch.compiler.is_compiling() and _traced:
        name = _traced[-1]
    if not name:
        return _default
    # what was registered may have been taken out in the meantime
    return name if name in (*NAMES, "auto") else "auto"
