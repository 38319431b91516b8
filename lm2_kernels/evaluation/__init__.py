"""What a model remembers: tasks and how they are scored, and any model asked them."""

from lm2_kernels.evaluation.accuracy import Accuracy, answer_accuracy, evaluate
from lm2_kernels.evaluation.asking import ask
from lm2_kernels.evaluation.prompts import prompt
from lm2_kernels.evaluation.reading import Reader, load_reader
from lm2_kernels.evaluation.results import Results
from lm2_kernels.evaluation.samples import Sample, plain
from lm2_kernels.evaluation.scoring import harness, leaderboard
from lm2_kernels.evaluation.stories import QATask
from lm2_kernels.evaluation.tasks import all_words, task

__all__ = [
    "Accuracy",
    "QATask",
    "Reader",
    "Results",
    "Sample",
    "all_words",
    "answer_accuracy",
    "ask",
    "evaluate",
    "harness",
    "leaderboard",
    "load_reader",
    "plain",
    "prompt",
    "task",
]
