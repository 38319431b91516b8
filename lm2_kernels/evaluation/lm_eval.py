"""A reader as a model of EleutherAI's lm-evaluation-harness, which need not be installed.

``lm_eval.simple_evaluate(model=harness_model(reader), tasks=["lambada_openai"])`` asks its tasks.
For every request the memory starts afresh.
"""

import functools
from collections.abc import Iterator, Sequence

from lm2_kernels.evaluation.reading import Reader, load_reader

__all__ = ["NAME", "harness_class", "harness_model"]

# by which the harness knows the class
NAME = "lm2_kernels"
# what the harness takes where a task says nothing
_TOKENS = 256
# requests that are read together, where nobody says how many
_BATCH = 8


def harness_model(reader: Reader, batch_size: int = _BATCH) -> object:
    """A reader as the harness takes models.

    Args:
        reader: of text; models of words are refused.
        batch_size: requests that are read together.

    Raises:
        ValueError: the harness is not installed, or the model knows words of a list alone.
    """
    return harness_class()(reader, batch_size=batch_size)


@functools.cache
def harness_class() -> type:
    """The class ``TemplateLM`` of the harness, for readers; registered as "lm2_kernels".

    Raises:
        ValueError: the harness is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM  # noqa: PLC0415 - only for this
        from lm_eval.api.registry import register_model  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(f"lm-evaluation-harness: pip install lm_eval ({error})") from None

    @register_model(NAME)
    class HarnessModel(TemplateLM):
        """See :func:`harness_model`; ``pretrained`` is a reader, or what ``load_reader`` takes."""

        def __init__(
            self,
            pretrained: Reader | str,
            memory: str | None = None,
            window: int | None = None,
            batch_size: int | str = _BATCH,
            device: str | None = None,
            **_: object,
        ):
            super().__init__()
            if not isinstance(pretrained, Reader):
                pretrained = load_reader(pretrained, memory=memory, window=window, device=device)
            if pretrained.knows_words_alone:
                raise ValueError("the harness asks in free text, and the model knows words alone")
            self.reader = pretrained
            self.tokenizer = pretrained.tokenizer
            # what the harness would find by trying, nothing here tries
            is_auto = str(batch_size).startswith("auto")
            self.batch_size = _BATCH if is_auto else int(batch_size)

        @property
        def eot_token_id(self) -> int:
            """What stands before a text: the token that ends one, or for bytes a line's end."""
            return [*self.reader.ends(), ord("\n")][0]

        def tok_encode(self, string: str, **_: object) -> list[int]:
            """Without what the tokenizer would put before it, as the harness's own models do."""
            special = {"add_special_tokens": False} if self.reader.adds_tokens else {}
            return self.tokenizer.encode(string, **special)

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple], **_: object
        ) -> list[tuple[float, bool]]:
            rows = [[*context, *continuation] for _, context, continuation in requests]
            return self._scored(rows, [len(continuation) for *_, continuation in requests])

        def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list:
            """The sums over whole texts."""
            texts = [self.tok_encode(request.args[0]) for request in requests]
            rows = [[self.eot_token_id, *text] for text in texts]
            return [total for total, _ in self._scored(rows, list(map(len, texts)))]

        def _scored(self, rows: list[list[int]], counts: list[int]) -> list[tuple[float, bool]]:
            # neighbours are of one length, which are read together
            order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
            found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
            for some in _chunks(order, self.batch_size):
                scores = self.reader.score([rows[p] for p in some], [counts[p] for p in some])
                for place, pair in zip(some, scores, strict=True):
                    found[place] = pair
            return found

        def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
            """Greedy answers, each up to the first of its request's end texts."""
            answers = []
            for some in _chunks(requests, self.batch_size):
                options = [dict(request.args[1]) for request in some]
                if any(option.get("do_sample") for option in options):
                    raise NotImplementedError("answers are greedy: do_sample must be False")
                limits = [option.get("max_gen_toks", _TOKENS) for option in options]
                said = self.reader.answer([request.args[0] for request in some], limits)
                answers += [
                    _before(text, option.get("until") or [])
                    for text, option in zip(said, options, strict=True)
                ]
            return answers

    return HarnessModel


def _before(text: str, ends: str | Sequence[str]) -> str:
    """A text up to the first of some others."""
    ends = [ends] if isinstance(ends, str) else ends
    return min((text.partition(end)[0] for end in ends if end), key=len, default=text)


def _chunks(things: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(things), size):
        yield things[start : start + size]
