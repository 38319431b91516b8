"""The backends: one contract, several implementations, and the choice between them.

**The contract.** A backend is a module ``lm2_kernels.backends.<name>``, or an object that was given
to :class:`register`, with ``DEVICES``, ``unsupported_reason`` and, for each op in :data:`OPS`, the
two functions below. Arguments are positional, in this order, already validated
and of canonical rank (shapes as in :mod:`lm2_kernels.reference`); tensors may have any strides
whose last axis is contiguous. Results are new contiguous tensors. ``None`` stands for an optional
input that is absent, or for the gradient of an output that was not used. A gradient that is not
needed (``needs_*`` False) comes back as an empty tensor. float64 is computed in float64, every
other dtype is accumulated in float32.

``memory_attention_forward(query, key, value, slot_mask, seed, causal, slot_offset, scale, top_k,
dropout_p) -> (out, lse)``
    ``lse`` (B, H, T), float32 (float64 for float64): the natural log-sum-exp of a row's visible
    scores, +inf for a row that sees no slot. ``seed``: int64 scalar tensor on the device, or None
    without dropout; the keep mask is the one of :mod:`lm2_kernels.backends.dropout`.
``memory_attention_backward(dout, query, key, value, slot_mask, seed, out, lse, causal, slot_offset,
scale, top_k, dropout_p, needs_dquery, needs_dkey_value) -> (dquery, dkey_value)``
    ``dkey_value`` (B, N, 2, H, K): dK and dV in one buffer, ready for a packed projection.

``memory_update_forward(hidden, candidate, memory, input_gate, forget_gate, output_gate, gate_bias,
output) -> (output, new_memory)``
    ``candidate``, the gates and ``gate_bias`` share the activation dtype; ``hidden`` and ``memory``
    have it or float32, and give their dtype to the two results. ``output``: "read" or "memory".
``memory_update_backward(doutput, dnew_memory, candidate, memory, input_gate, forget_gate,
output_gate, gate_bias, output, needs_dcandidate, needs_dmemory, needs_dgates)
-> (dcandidate, dmemory, dgates)``
    ``dgates`` (B, T, G, D): of the input, forget and (G = 3) output gate, not yet summed over a
    broadcast T. The gradient of ``hidden`` is ``doutput`` itself.

``residual_layer_norm_forward(x, residual, weight, bias, eps) -> (out, mean, rstd)``
    ``mean``, ``rstd`` (B, T), float32 (float64 for float64).
``residual_layer_norm_backward(dout, x, residual, weight, mean, rstd, needs_dx, needs_dparams)
-> (dx, dweight, dbias)``
    ``dx`` serves both summands; it is float32 where their dtypes differ.

``pooled_gate_forward(x, weight, pooled_sum, prefix, num_pooled) -> (pooled, new_sum)``
    ``new_sum`` (B, D), float32 (float64 for float64).
``pooled_gate_backward(dpooled, dnew_sum, x, weight, prefix, num_pooled, needs_dx, needs_dweight,
needs_dpooled_sum) -> (dx, dweight, dpooled_sum)``

``DEVICES``: what it runs on, by torch's type of device and in words, as ``{"cuda": "NVIDIA
GPUs"}``; None is any. It is given nothing that lies elsewhere.

``unsupported_reason(op, *tensors) -> str | None`` says why the backend cannot run ``op`` on these
tensors (or, without tensors, on this machine). It feeds the error text, ``info`` and test skips.
torch.compile traces it: what it cannot trace goes into a :func:`constant_when_compiled`.

Backends never import one another. What two of them share lives in
:mod:`lm2_kernels.backends.composite` and :mod:`lm2_kernels.backends.dropout`.
"""

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

OPS = ("memory_attention", "memory_update", "residual_layer_norm", "pooled_gate")
# in the order of preference; register adds to it
NAMES: tuple[str, ...] = ("triton", "cpp", "eager")
ENVIRONMENT_VARIABLE = "LM2_KERNELS_BACKEND"

_BUILT_IN = NAMES
_FUNCTIONS = tuple(f"{op}_{way}" for op in OPS for way in ("forward", "backward"))
# modules, and the objects that were registered
_modules: dict[str, Any] = {}
_import_errors: dict[str, str] = {}
_requested = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
_recordings: list[list[tuple[str, str]]] = []
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
        backend: a module, or another object, with what the contract above names.
        before: the backend that "auto" asks next where this one refuses; unless given it is asked
            first of all.

    Raises:
        ValueError: the name is taken or no identifier, or ``before`` is unknown.
        TypeError: the object lacks something; the text lists what.
    """

    def __init__(self, name: str, backend: object, *, before: str | None = None):
        global NAMES
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f"register: the name must be an identifier, got {name!r}")
        if name in (*NAMES, "auto"):
            raise ValueError(f"register: there is a backend '{name}' already")
        if before is not None and before not in NAMES:
            raise ValueError(f"register: before must be one of {NAMES}, got {before!r}")
        functions = ("unsupported_reason", *_FUNCTIONS)
        missing = [item for item in functions if not callable(getattr(backend, item, None))]
        if not isinstance(getattr(backend, "DEVICES", 0), Mapping | None):
            missing.append("DEVICES (a dict, or None)")
        if missing:
            raise TypeError(
                f"register: backend '{name}' lacks {', '.join(missing)}; the contract is in the "
                f"docstring of lm2_kernels.backends"
            )
        place = 0 if before is None else NAMES.index(before)
        _modules[name] = backend
        NAMES = (*NAMES[:place], name, *NAMES[place:])
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception) -> None:
        unregister(self._name)


def unregister(name: str) -> None:
    """Take out a backend that :class:`register` added; if it is the default, "auto" is from now on.

    Raises:
        ValueError: no such backend was registered.
    """
    global NAMES, _requested
    if name not in NAMES or name in _BUILT_IN:
        raise ValueError(f"unregister: there is no registered backend {name!r}")
    NAMES = tuple(other for other in NAMES if other != name)
    del _modules[name]
    if _requested == name:
        _requested = "auto"


@constant_when_compiled
def _has_autocast(device_type: str) -> bool:
    # asking whether it is enabled raises on a device without it (meta)
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast in force on this type of device, or None."""
    if _has_autocast(device_type) and torch.is_autocast_enabled(device_type):
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
    request = _requested if backend is None else backend
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
    record(function, name)
    implementation = getattr(get(name), function)
    device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
    if autocast_dtype(device) is not None:
        # the op has its dtypes by now: autocast must not touch a backend's own arithmetic
        with torch.autocast(device, enabled=False):
            return implementation(*args)
    return implementation(*args)


def record(function: str, name: str) -> None:
    """Note in every open :func:`recording` that ``name`` ran ``function``."""
    for recorded in _recordings:
        recorded.append((function, name))


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[str, str]]]:
    """Collect ``(function, backend)`` for every backend call made in the block.

    A call that triton or cpp hands to the composite path is followed by a second entry with the
    backend's name and ``/composite``.
    """
    recorded: list[tuple[str, str]] = []
    _recordings.append(recorded)
    try:
        yield recorded
    finally:
        # by identity: two recordings may hold equal lists
        _recordings[:] = [r for r in _recordings if r is not recorded]


class use_backend:  # noqa: N801 - used like a function, as torch.no_grad is
    """Set the default backend, until the ``with`` block ends or for good.

    ``use_backend("eager")`` alone is a setter for the whole process; as a context manager it
    restores the earlier default. ``"auto"`` takes the first backend that can run each call.

    Raises:
        ValueError: the name is unknown.
    """

    def __init__(self, backend: str):
        global _requested
        check_choice(backend)
        self._previous = _requested
        _requested = backend

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception) -> None:
        global _requested
        _requested = self._previous


def requested_backend() -> str:
    """The default backend in force: a backend's name or "auto"."""
    return _requested
