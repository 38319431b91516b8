"""How often a model's likeliest token is the right one, and its whole answer."""

import dataclasses
import math
import statistics
from collections.abc import Iterable

import torch
from torch import nn

from lm2_kernels.training.loop import Batch, autocast_in, evaluating, moved


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How many predicted tokens were right."""

    right: int
    total: int

    @property
    def share(self) -> float:
        """From 0 to 1; NaN of nothing."""
        return self.right / self.total if self.total else math.nan

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval of the share that would be right of infinitely many.

        ``(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)``, where ``p`` of
        ``n`` are right and ``z`` is the normal quantile at ``(1 + confidence) / 2``: all shares for
        which ``p`` is no further than ``z`` standard errors away. It stays between 0 and 1, and is
        no point where all or none are right. (E. B. Wilson, "Probable inference, the law of
        succession, and statistical inference", Journal of the American Statistical Association 22,
        1927, pages 209 to 212.)

        Args:
            confidence: above 0 and below 1.

        Returns:
            Its ends; 0 and 1 of nothing.

        Raises:
            ValueError: ``confidence`` is not between 0 and 1.
        """
        if not 0.0 < confidence < 1.0:
            raise ValueError(f"Accuracy: confidence must be between 0 and 1, got {confidence}")
        if self.total == 0:
            return 0.0, 1.0
        z = statistics.NormalDist().inv_cdf((1.0 + confidence) / 2.0)
        p, n = self.share, self.total
        middle = p + z * z / (2 * n)
        reach = z * math.sqrt(p * (1.0 - p) / n + z * z / (4 * n * n))
        low, high = ((middle + side * reach) / (1.0 + z * z / n) for side in (-1, 1))
        # what is rounded is not beyond the share itself
        return max(0.0, min(low, p)), min(1.0, max(high, p))

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} % ({self.right} of {self.total})"


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], *, autocast: torch.dtype | None = None
) -> Accuracy:
    """How often the likeliest token is the label, over all labels that are not -100.

    Args:
        model: called as ``model(input_ids, ...)``; its result has ``logits`` (B, L, V).
        batches: dicts of tensors with "input_ids" and "labels", all of them used.
        autocast: run the model under autocast in this dtype; None does not.
    """
    device = next(model.parameters()).device
    # on the device, which the loop need not wait for
    right = total = torch.zeros((), dtype=torch.int64, device=device)
    with evaluating(model):
        for batch in batches:
            inputs = moved(batch, device)
            targets = inputs.pop("labels")[:, 1:]
            with autocast_in(device, autocast):
                predicted = model(**inputs).logits[:, :-1].argmax(-1)
            counted = targets != -100
            right = right + ((predicted == targets) & counted).sum()
            total = total + counted.sum()
    return Accuracy(int(right), int(total))


@torch.no_grad()
def answer_accuracy(
    model: nn.Module, batches: Iterable[Batch], *, autocast: torch.dtype | None = None
) -> Accuracy:
    """How many rows are answered right in full, greedily.

    A row's answer is where its labels are not -100. Its first word that is wrong is what the model
    says after right ones, so one pass over the right answer tells, and none is generated.

    Args:
        model: called as ``model(input_ids)``; its result has ``logits`` (B, L, V).
        batches: dicts of "input_ids" and "labels" (B, L); "input_ids" have the answers too, but
            for each one's last token, which nothing is read after. No "attention_mask".
        autocast: as of :func:`evaluate`.
    """
    device = next(model.parameters()).device
    right, total = torch.zeros((), dtype=torch.int64, device=device), 0
    with evaluating(model):
        for batch in batches:
            inputs = moved(batch, device)
            targets = inputs["labels"][:, 1:]
            with autocast_in(device, autocast):
                said = model(inputs["input_ids"]).logits[:, :-1].argmax(-1)
            right = right + ((said == targets) | (targets == -100)).all(1).sum()
            total += len(targets)
    return Accuracy(int(right), total)
