"""What a model remembers: tasks and how they are scored."""

from lm2_kernels.evaluation.accuracy import Accuracy, evaluate
from lm2_kernels.evaluation.asking import ask
from lm2_kernels.evaluation.reading import Reader, load_reader
from lm2_kernels.evaluation.results import Results
from lm2_kernels.evaluation.stories import QATask
from lm2_kernels.evaluation.tasks import task

__all__ = ["Accuracy", "QATask", "Reader", "Results", "ask", "evaluate", "load_reader", "task"]
