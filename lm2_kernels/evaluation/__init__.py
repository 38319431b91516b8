"""What a model remembers: tasks and how they are scored."""

from lm2_kernels.evaluation.accuracy import Accuracy, answer_accuracy, evaluate
from lm2_kernels.evaluation.stories import QATask

__all__ = ["Accuracy", "QATask", "answer_accuracy", "evaluate"]
