"""Training: the loop, its data, several processes."""

from lm2_kernels.training.loop import learning_rate, mean_loss, optimizer_groups, train

__all__ = ["learning_rate", "mean_loss", "optimizer_groups", "train"]
