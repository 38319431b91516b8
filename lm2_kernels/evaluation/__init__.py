"""What a model remembers: tasks and how they are scored."""

from lm2_kernels.evaluation.accuracy import Accuracy, answer_accuracy, evaluate
from lm2_kernels.evaluation.prompts import prompt
from lm2_kernels.evaluation.samples import Sample, plain
from lm2_kernels.evaluation.scoring import harness, leaderboard
from lm2_kernels.evaluation.stories import QATask
from lm2_kernels.evaluation.tasks import all_words, task

__all__ = [
    "Accuracy",
    "QATask",
    "Sample",
    "all_words",
    "answer_accuracy",
    "evaluate",
    "harness",
    "leaderboard",
    "plain",
    "prompt",
    "task",
]
