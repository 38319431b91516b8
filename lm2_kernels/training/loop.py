"""A small training loop: for the demo and for your own data.

Of the model it uses the call ``model(**batch)`` with its loss, and ``parameters()``; so a model
wrapped for several devices trains the same way.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from lm2_kernels.checks import check_int, check_scale

Batch = dict[str, Tensor]  # the arguments of the model, and perhaps "weight"


def learning_rate(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """The factor on the peak learning rate at a step from 0 to ``steps - 1``.

    Up to 1 in ``warmup`` equal steps, then a half cosine that would meet ``floor`` at ``steps``.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups in which weights decay, but biases, gates' scales and norms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def seeded(batches: Iterable[Batch], seed: int, first: int, rank: int) -> Iterator[Batch]:
    """The batches; what is random in a step is, like its batch, a function of its number alone."""
    for number, batch in enumerate(batches, first):
        (state,) = np.random.SeedSequence((seed, number, rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(state))
        yield batch


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float,
    first: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    warmup: int = 0,
    floor: float = 0.1,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.98),
    clip: float | None = 1.0,
    autocast: torch.dtype | None = None,
    bptt_segments: int | None = None,
    progress: Callable[[int, int, float], object] | None = None,
) -> list[float]:
    """Train with AdamW, the learning rate warmed up and then a cosine.

    Every batch starts from the model's initial memory. A GPU does not wait for the loop: a loss is
    read while it is busy with that step's backward pass.

    Args:
        model: called as ``model(**batch, bptt_segments=bptt_segments)``; its result has ``loss``.
        batches: dicts of tensors with "input_ids" and "labels", at least as many as there are steps
            to do. They are moved to where the parameters are. A "weight" is not the model's: the
            loss is multiplied by it before its gradients are computed, and reported without.
        steps: of the whole run, a batch each.
        lr: the peak learning rate.
        first: steps of the run that were done before.
        optimizer: with groups whose "lr" is set at every step; AdamW with
            :func:`optimizer_groups` unless given, and then ``weight_decay`` and ``betas`` are its.
        warmup: steps up to it.
        floor: the share of ``lr`` that is left at the end.
        weight_decay: of parameters with two dimensions or more.
        betas: of AdamW.
        clip: the largest norm of all gradients together; None does not clip.
        autocast: run the model under autocast in this dtype; None does not.
        bptt_segments: over how many segments gradients reach back; None is all.
        progress: called after each step with the steps done, ``steps`` and the step's loss.
            Returning True stops.

    Returns:
        The loss of every step that was done.

    Raises:
        TypeError, ValueError: an option does not fit, or there are too few batches.
        FloatingPointError: a loss is not finite. The parameters are those before its step.
    """
    check_int("train", "steps", steps, 1)
    check_int("train", "first", first, 0, steps)
    check_int("train", "warmup", warmup, 0)
    check_scale("train", lr)
    if clip is not None:
        check_scale("train", clip)
        if clip <= 0.0:
            raise ValueError(f"train: clip must be above 0, or None, got {clip}")
    device = next(model.parameters()).device
    if optimizer is None:
        optimizer = torch.optim.AdamW(optimizer_groups(model, weight_decay), lr=lr, betas=betas)
    was_training, losses, source = model.training, [], iter(batches)
    model.train()
    try:
        for step in range(first, steps):
            batch = next(source, None)
            if batch is None:
                raise ValueError(
                    f"train: {steps - first} steps need as many batches, got {step - first}"
                )
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate(step, steps, warmup, floor)
            inputs = moved(batch, device)
            weight = inputs.pop("weight", None)
            with autocast_in(device, autocast):
                loss = model(**inputs, bptt_segments=bptt_segments).loss
            fetched = _Fetched(loss)
            optimizer.zero_grad()
            (loss if weight is None else loss * weight).backward()
            # now that the device has the backward pass to do
            value = fetched.value()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"train: the loss of step {step + 1} is {value}; try a lower lr, a longer "
                    f"warmup or a smaller clip"
                )
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            losses.append(value)
            if progress is not None and progress(step + 1, steps, value) is True:
                break
    finally:
        model.train(was_training)
    return losses


class _Fetched:
    """A loss on its way to the CPU: to read it is to wait for it, but not for what came after."""

    def __init__(self, loss: Tensor):
        self._copy, self._event = loss.detach(), None
        # elsewhere a copy that nobody waits for cannot be told from one that is there
        if loss.device.type in ("cuda", "xpu"):
            self._copy = self._copy.to("cpu", non_blocking=True)
            self._event = torch.Event(loss.device)
            self._event.record()

    def value(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return self._copy.tolist()


@torch.no_grad()
def mean_loss(
    model: nn.Module, batches: Iterable[Batch], *, autocast: torch.dtype | None = None
) -> float:
    """The mean of the batches' losses; arguments as of :func:`lm2_kernels.evaluation.evaluate`."""
    device, losses = next(model.parameters()).device, []
    with evaluating(model):
        for batch in batches:
            with autocast_in(device, autocast):
                losses.append(model(**moved(batch, device)).loss)
    # all at once: a GPU waits for each number that is read
    return torch.stack(losses).cpu().double().mean().item() if losses else math.nan


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode, and then each of its parts as before."""
    was = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, is_training in was:
            module.training = is_training


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def autocast_in(
    device: torch.device, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager:
    """Autocast in a dtype; None is none."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)
