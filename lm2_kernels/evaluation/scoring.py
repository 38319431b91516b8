"""Whether an answer in free text is right, by the two rules that results on BABILong go by."""

import re

from lm2_kernels.evaluation.samples import Sample

__all__ = ["harness", "leaderboard"]

# where a model goes on with a prompt of its own, in lower case
_MARKS = ("<example>", "<context>")


def leaderboard(sample: Sample, prediction: str) -> bool:
    """BABILong's own rule, as its code has it: exactly the target among the task's labels.

    Of the prediction counts the first sentence, up to the next mark of an example or a context, in
    lower case. The labels in it, without those that the question names, must be the
    target, or where that is a list, exactly its members in any order.

    BABILong's code would cut at "Question", too, but of a text in lower case, which has no such
    word: what a model goes on to ask counts, there as here. Labels are whole words here, so that
    "nothing" holds no "no". A sample without labels is right if the answer stands in that sentence.
    """
    text = _tidy(prediction)
    for mark in _MARKS:
        text = text.partition(mark)[0]
    text = text.partition(".")[0]
    answer = _tidy(sample.answer)
    if not sample.labels:
        return _holds(text, answer)
    labels = {_tidy(label) for label in sample.labels}
    found = {label for label in labels if _holds(text, label)}
    named = {label for label in labels if _holds(_tidy(sample.question), label)}
    return found - named == ({answer} if answer in labels else set(answer.split(",")))


def harness(sample: Sample, prediction: str) -> bool:
    """The rule of lm-evaluation-harness: the target stands anywhere in the prediction.

    In any case; so "nothing" holds "no", a prediction that names every label is right, and a list
    counts in its own order alone.
    """
    return sample.answer.lower() in prediction.lower()


def _tidy(text: str) -> str:
    return re.sub(r"\s*,\s*", ",", text.lower())


def _holds(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None
