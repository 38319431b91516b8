"""What a model remembers: tasks and how they are scored."""

from lm2_kernels.evaluation.accuracy import Accuracy, evaluate
from lm2_kernels.evaluation.stories import QATask

__all__ = ["Accuracy", "QATask", "evaluate"]
