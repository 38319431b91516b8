"""Is what this machine computes right? The work of ``python -m lm2_kernels verify``.

Every backend that runs here is held to the rule of :mod:`lm2_kernels.testing` on the cases listed
there, forward and every gradient, and both layers to the golden tensors that ship with the package.
A check is one case, or one golden file, on one backend in one dtype: all its tensors have to pass,
and the recording of backend calls has to show that this backend did the work.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from lm2_kernels import backends, machine, reference
from lm2_kernels.backends.contract import op_and_way
from lm2_kernels.layers.paper import PaperMemory
from lm2_kernels.layers.release import ReleaseMemory
from lm2_kernels.terminal import columns
from lm2_kernels.testing.cases import (
    CASES,
    DTYPES,
    SMALL_CASES,
    Case,
    make_inputs,
    unsupported_reason,
)
from lm2_kernels.testing.rule import ZERO_FLOOR, Comparison, check_case, compare

# float64 against golden tensors, relative to a tensor's largest element: the numbers come from
# other code in another order of operations, so the few ulps of FLOAT64_ULPS are too few
GOLDEN_FLOAT64 = 1e-12
# below this an element of a golden tensor is float64's rounding error of a 0
GOLDEN_ZERO = ZERO_FLOOR * torch.finfo(torch.float64).eps
LAYERS = {"paper": "PaperMemory", "release": "ReleaseMemory"}
LAYER_OPS = {layer.__name__: layer.OPS for layer in (PaperMemory, ReleaseMemory)}
_MAX_FAILURES_SHOWN = 20


class UnavailableError(ValueError):
    """What was asked for by name cannot run on this machine; the text says why."""


class Golden(NamedTuple):
    """One golden file: the tensors of a layer, computed by other code than ours."""

    id: str
    layer: str
    metadata: dict[str, str]
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors ``<prefix>.<name>``, by name."""
        return {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }


class Skip(NamedTuple):
    """What a backend does not claim to run, with its reason."""

    backend: str
    subject: str  # of one case, or "all"
    dtype: str
    reason: str


class Check(NamedTuple):
    """One case or golden file on one backend in one dtype."""

    backend: str
    subject: str  # an op, or a layer where the case is a golden file
    case: str
    dtype: str
    device: str
    comparisons: list[Comparison]
    error: str | None  # what it raised

    @property
    def share(self) -> float:
        """The worst tensor's error as a share of what is allowed."""
        if self.error is not None or not self.comparisons:
            return math.inf
        return max(comparison.share for comparison in self.comparisons)

    @property
    def passed(self) -> bool:
        return self.share <= 1.0


class Report(NamedTuple):
    """What ran, what did not, and how it went."""

    checks: list[Check]
    skips: list[Skip]
    seed: int
    seconds: float

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def passed(self) -> bool:
        # nothing checked is nothing verified
        return bool(self.checks) and not self.failures


def verify(
    names: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    device: str | None = None,
    *,
    seed: int = 0,
    cases: Sequence[Case] | None = None,
    progress: Callable[[int, int, Check | Skip], None] = lambda done, total, result: None,
) -> Report:
    """Check every backend x case x dtype.

    Args:
        names: backends; every one that runs here unless given.
        dtypes: names of dtypes; unless given all of them, float64 not for triton.
        device: "cpu", or the accelerator's type; unless given that if there is one and the backend
            runs there, the CPU for float64.
        seed: of the cases' inputs and dropout.
        cases: the cases; unless given all of them, the small ones under an interpreter.
        progress: called after each check with its number, how many there are, and the result.

    Raises:
        UnavailableError: a backend asked for by name cannot run here.
        ValueError: there is no such device here.
    """
    start = time.perf_counter()
    if device is not None:
        machine.check_device(device)
    best_first = machine.device_types()[::-1]
    jobs: list[tuple[str, str, str, Case | Golden]] = []
    goldens = [load_golden(path) for path in packaged_golden()]
    checks: list[Check] = []
    skips: list[Skip] = []
    for name in names or backends.NAMES:
        chosen = _default_cases(name) if cases is None else cases
        subjects: list[Case | Golden] = [*chosen, *goldens]
        runs = False
        for dtype in dtypes or DTYPES:
            if dtype == "float64" and name == "triton" and not dtypes:
                continue
            places = ("cpu",) if dtype == "float64" else best_first
            places = (device,) if device else places
            reasons = {
                where: [unsupported_reason(name, op, DTYPES[dtype], where) for op in backends.OPS]
                for where in places
            }
            where = next((where for where in places if None in reasons[where]), None)
            if where is not None:
                runs = True
                jobs += [(name, dtype, where, subject) for subject in subjects]
            else:
                skips.append(Skip(name, "all", dtype, reasons[places[0]][0]))
        if name in names and not runs:
            raise UnavailableError(f"backend '{name}' cannot run: {skips[-1].reason}")
    with _steady_arithmetic():
        for number, job in enumerate(jobs, start=1):
            result = _run(*job, seed)
            (checks if isinstance(result, Check) else skips).append(result)
            progress(number, len(jobs), result)
    return Report(checks, skips, seed, time.perf_counter() - start)


def interpreted(name: str) -> bool:
    """Whether this backend's kernels run in an interpreter, so only small cases are bearable."""
    return name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def _default_cases(name: str) -> Sequence[Case]:
    return SMALL_CASES if interpreted(name) else CASES


@contextlib.contextmanager
def _steady_arithmetic() -> Iterator[None]:
    """One CPU thread and no TF32, restored afterwards."""
    threads = torch.get_num_threads()
    newer = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    precisions = [matmul.fp32_precision for matmul in newer]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        # set by the newer way alone, which the older one does not answer for
        precision = "highest"
    # tensors this small lose to the cost of waking threads: all cases on two busy cores, eager,
    # took 2 s with one thread and 52 s with two
    torch.set_num_threads(1)
    # the rule measures against plain float32 products
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        for matmul, before in zip(newer, precisions, strict=True):
            matmul.fp32_precision = before


def _run(name: str, dtype: str, device: str, subject: Case | Golden, seed: int) -> Check | Skip:
    """One job. Whatever it raises is a failed check, not the end of the run."""
    title = subject.layer if isinstance(subject, Golden) else subject.op
    comparisons, error = [], None
    try:
        if isinstance(subject, Golden):
            reasons = [
                unsupported_reason(name, op, DTYPES[dtype], device) for op in LAYER_OPS[title]
            ]
            reason = next((reason for reason in reasons if reason is not None), None)
            if reason is None:
                comparisons = _compare_golden(name, DTYPES[dtype], device, subject)
        else:
            inputs = make_inputs(subject, DTYPES[dtype], device, seed=seed)
            reason = backends.unsupported_reason(name, title, *inputs.tensors.values())
            if reason is None:
                with _must_run(name, (title,)):
                    comparisons = check_case(subject, DTYPES[dtype], name, device, seed=seed)
        if reason is not None:
            return Skip(name, title, dtype, reason)
    except Exception as exception:
        error = f"{type(exception).__name__}: {exception}"
    return Check(name, title, subject.id, dtype, device, comparisons, error)


@contextlib.contextmanager
def _must_run(name: str, ops: Sequence[str]) -> Iterator[None]:
    """Raise unless backend ``name``, and no other, ran forward and backward of each op."""
    with backends.recording() as calls:
        yield
    wanted = {(op, way, name) for op in ops for way in ("forward", "backward")}
    foreign = [backend for _, backend in calls if backend.partition("/")[0] != name]
    if foreign or not wanted <= {(*op_and_way(function), backend) for function, backend in calls}:
        raise RuntimeError(f"backend '{name}' was asked for, but these calls were made: {calls}")


def packaged_golden() -> list[Path]:
    """The golden files that ship with the package, for ``verify``."""
    return sorted((Path(__file__).parent / "golden").glob("*.safetensors"))


def load_golden(path: Path) -> Golden:
    """Read a golden file."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    return Golden(path.stem, LAYERS[metadata["formulation"]], metadata, tensors)


def _compare_golden(name: str, dtype: torch.dtype, device: str, golden: Golden) -> list[Comparison]:
    """The layer's outputs and gradients against the file's."""
    weights, metadata = golden.group("weights"), golden.metadata
    inputs = {key: golden.tensors[f"inputs.{key}"].to(device, dtype) for key in ("x", "memory")}
    where: dict[str, object] = {"slot_offset": int(metadata.get("slot_offset", 0))}
    if "inputs.slot_mask" in golden.tensors:
        where["slot_mask"] = golden.tensors["inputs.slot_mask"].to(device)
    elif "inputs.masked_slots" in golden.tensors:
        where["slot_mask"] = ~golden.tensors["inputs.masked_slots"].to(device)
    options: dict[str, object] = {"top_k": int(metadata["topk"]) or None}
    dim, num_heads = inputs["x"].shape[-1], int(metadata["heads"])
    if golden.layer == "PaperMemory":
        options["output"] = metadata["output"]
        bias = "query_proj.bias" in weights
        layer = PaperMemory(dim, num_heads, bias=bias, backend=name, **options)
        oracle = reference.paper_memory
    else:
        options["num_blocks"] = int(metadata["num_blocks"])
        options["attention_mlp_layers"] = len({key for key in weights if "mlp" in key}) // 2
        options["eps"] = float(metadata["layer_norm_eps"])
        layer = ReleaseMemory(dim, num_heads, backend=name, **options)
        oracle = reference.release_memory
    layer.to(torch.float64).load_state_dict(weights)
    layer.to(device, dtype)

    def run_reference(x: Tensor, memory: Tensor, **parameters: Tensor):
        return oracle(x, memory, parameters, num_heads=num_heads, **where, **options)[:2]

    def run_layer(x: Tensor, memory: Tensor, **parameters: Tensor):
        return torch.func.functional_call(layer, parameters, (x, memory), where)

    leaves = {**inputs, **dict(layer.named_parameters())}
    cotangents = [golden.tensors[f"cotangents.{key}"].to(device, dtype) for key in ("y", "memory")]
    with _must_run(name, LAYER_OPS[golden.layer]):
        watched = _differentiate(run_layer, leaves, cotangents)
    # where nobody watches its parts a layer may be one call
    runs = watched, _differentiate(run_layer, leaves, cotangents)
    eager = _differentiate(run_reference, leaves, cotangents)
    expected = {f"output {key}": tensor for key, tensor in golden.group("outputs").items()}
    expected |= {f"d{key}": tensor for key, tensor in golden.group("grads").items()}
    if set(expected) != set(watched):
        raise RuntimeError(f"the file and the layer differ in {set(expected) ^ set(watched)}")
    expected = {key: tensor.to(device) for key, tensor in expected.items()}
    if dtype == torch.float64:
        return [
            _compare_float64(key, results[key], value)
            for results in runs
            for key, value in expected.items()
        ]
    return [
        _compare_together([key for key in expected if key[0] == kind], results, expected, eager)
        for results in runs
        for kind in "od"
    ]


def _differentiate(
    function: Callable, tensors: dict[str, Tensor], cotangents: list[Tensor]
) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    output, memory = function(**leaves)
    gradients = torch.autograd.grad((output, memory), list(leaves.values()), cotangents)
    results = {"output y": output.detach(), "output memory": memory.detach()}
    results.update({f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)})
    return results


def _compare_float64(name: str, got: Tensor, golden: Tensor) -> Comparison:
    bound = max(GOLDEN_FLOAT64 * float(golden.abs().max()), GOLDEN_ZERO)
    share = float((got - golden).abs().max()) / bound
    return Comparison(name, share, share)


def _compare_together(
    names: list[str],
    got: dict[str, Tensor],
    golden: dict[str, Tensor],
    eager: dict[str, Tensor],
) -> Comparison:
    """The rule for several tensors as if they were one, each scaled to a size of about 1.

    The rule takes eager's error in a tensor for a measure of what is due to its dtype. A layer's
    gradients are as small as one number, and there eager's error is a matter of luck: tensor by
    tensor, one correct float32 layer in eleven fails, under permutations of its channels.
    """
    # powers of two, so that scaling is exact; a gradient whose true value is 0 (that of the keys'
    # bias, which moves all scores of a row alike) stays as it is
    sizes = [float(golden[name].square().mean().sqrt()) for name in names]
    factors = [2.0 ** -round(math.log2(size)) if size > GOLDEN_ZERO else 1.0 for size in sizes]

    def join(tensors: dict[str, Tensor]) -> Tensor:
        scaled = zip(names, factors, strict=True)
        return torch.cat([tensors[name].flatten() * factor for name, factor in scaled])

    joined = join(golden)
    result = compare(names[0], join(got), joined, join(eager))
    counts = [golden[name].numel() for name in names]
    errors = [part.max() for part in (join(got).double() - joined).abs().split(counts)]
    worst = names[max(range(len(names)), key=lambda index: float(errors[index]))]
    return result._replace(name=f"{len(names)} tensors, worst in {worst}")


def render(report: Report) -> str:
    """The table, what was skipped and why, and the verdict."""
    dtypes = list(dict.fromkeys(check.dtype for check in report.checks))
    rows = [["backend", "checked", "cases", *dtypes]]
    for backend, subject in dict.fromkeys((c.backend, c.subject) for c in report.checks):
        checks = [c for c in report.checks if (c.backend, c.subject) == (backend, subject)]
        cells = [_cell([check for check in checks if check.dtype == dtype]) for dtype in dtypes]
        rows.append([backend, subject, str(len({check.case for check in checks})), *cells])
    lines = columns(rows) if report.checks else []
    if report.checks:
        lines.append("(worst error as a share of what is allowed, over outputs and gradients)")
    lines += _skip_lines(report)
    failures = report.failures
    if report.passed:
        lines.append(f"verify: {len(report.checks)} checks passed ({report.seconds:.0f} s)")
    elif not report.checks:
        lines.append("verify: FAILED, no check ran")
    else:
        lines.append(f"verify: {len(failures)} of {len(report.checks)} checks FAILED")
    for check in failures[:_MAX_FAILURES_SHOWN]:
        lines.append(f"  {check.case} on {check.backend}, {check.dtype}, {check.device}")
        if check.error is not None:
            lines.append(f"    {check.error}")
        lines += [
            f"    {c.name}: max error {c.max_share:.2f}, rms error {c.rms_share:.2f} of the bound"
            for c in check.comparisons
            if not c.passed
        ]
    if len(failures) > _MAX_FAILURES_SHOWN:
        lines.append(f"  ... and {len(failures) - _MAX_FAILURES_SHOWN} more (--json has them all)")
    return "\n".join(lines)


def _cell(checks: list[Check]) -> str:
    if not checks:
        return "-"
    worst = max(check.share for check in checks)
    return f"{worst:.2f}" if all(check.passed for check in checks) else f"{worst:.2f} FAILED"


def _skip_lines(report: Report) -> list[str]:
    """One line for each backend and reason; it names the dtypes if the backend ran others."""
    lines = []
    ran = {check.backend for check in report.checks}
    for backend, reason in dict.fromkeys((skip.backend, skip.reason) for skip in report.skips):
        skips = [s for s in report.skips if (s.backend, s.reason) == (backend, reason)]
        what = backend
        if backend in ran:
            what += f" {'/'.join(dict.fromkeys(skip.dtype for skip in skips))}"
            subjects = dict.fromkeys(skip.subject for skip in skips)
            what += "" if "all" in subjects else f" {'/'.join(subjects)} ({len(skips)} cases)"
        lines.append(f"skipped {what}: {reason}")
    return lines


def to_json(report: Report) -> dict:
    """Everything, with the versions and devices it holds for."""
    return {
        "passed": report.passed,
        "num_checks": len(report.checks),
        "num_failed": len(report.failures),
        "seed": report.seed,
        "seconds": report.seconds,
        "versions": machine.versions(),
        "devices": machine.devices(),
        "triton_interpreted": interpreted("triton"),
        "skipped": [skip._asdict() for skip in report.skips],
        "checks": [
            {
                **check._asdict(),
                "passed": check.passed,
                "comparisons": [
                    {
                        "tensor": comparison.name,
                        "max_share": _finite(comparison.max_share),
                        "rms_share": _finite(comparison.rms_share),
                        "passed": comparison.passed,
                    }
                    for comparison in check.comparisons
                ],
            }
            for check in report.checks
        ],
    }


def _finite(share: float) -> float | None:
    """JSON has no infinity: null is an error that is not finite, or one where none is allowed."""
    return share if math.isfinite(share) else None
