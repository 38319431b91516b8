"""Answers of any model, greedily: every prompt is read from a fresh memory, whatever came before.

A :class:`Reader` is a model with its tokenizer. How it reads is the model's kind:

- :class:`LM2ForCausalLM` reads by its segments and goes on from the state, a row at its own place;
- a model of ``transformers`` is asked by its ``generate``, with a memory that :func:`add_memory`
  gave it or without; with a ``window``, what does not fit in is read before it, window by window,
  and the memory alone is carried from one to the next;
- anything else is a function of token ids, which gives the logits of all of them, and is called
  for every token. So is a model of the released gate, which cannot go on within a segment.

What a row is answered depends on no other row, to rounding: the batch is for speed.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm2_kernels.checks import check_int
from lm2_kernels.evaluation.layout import Layout
from lm2_kernels.evaluation.samples import count_words
from lm2_kernels.machine import best_device
from lm2_kernels.model.decoder import LM2ForCausalLM
from lm2_kernels.patching.add import OPTIONS, load_memory
from lm2_kernels.patching.follow import MEMORY, AddedMemory
from lm2_kernels.patching.prints import fingerprint
from lm2_kernels.state import files
from lm2_kernels.state.hub import Place
from lm2_kernels.training.data import Bytes, Ids, Words, load_tokenizer
from lm2_kernels.training.folder import read_run
from lm2_kernels.training.loop import evaluating

__all__ = ["Reader", "load_reader"]

# how many of a prompt's words that a model does not know are named
_NAMED = 8
# tokens whose logits are in memory at once, about
_PIECE = 512


class Reader:
    """A model that answers prompts.

    Args:
        model: an :class:`LM2ForCausalLM`, a causal language model of ``transformers``, or a
            function of token ids (B, L) that returns logits (B, L, V), or an object that has them
            as ``logits``.
        tokenizer: of the model: one of ours, or of ``transformers``; what has ``encode`` and
            ``decode``.
        window: of a model of ``transformers``, how many tokens of the prompt it reads at once: the
            last so many, after those before them, window by window. An added memory is carried
            from window to window; without one, the last window is all that is read.
        prompt: the form of prompts that it was trained on, of those of
            :func:`~lm2_kernels.evaluation.asking.ask`; None if nobody knows.

    Raises:
        TypeError, ValueError: they do not go together.
    """

    def __init__(
        self,
        model: LM2ForCausalLM | nn.Module | Callable[[Tensor], object],
        tokenizer: object,
        *,
        window: int | None = None,
        prompt: str | None = None,
    ):
        if isinstance(tokenizer, Ids):
            raise ValueError(
                "the model takes token ids of a tokenizer that is not beside it, and text cannot "
                "be asked of it: in Python, give the tokenizer, "
                "lm2_kernels.evaluation.Reader(model, tokenizer)"
            )
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.window = window
        self.prompt = prompt
        self._is_own = isinstance(model, LM2ForCausalLM)
        self._is_hosted = not self._is_own and hasattr(model, "generation_config")
        # tokens that the model knows, where it says how many
        self._size: int | None = None
        if self._is_own:
            self._size = model.config.vocab_size
        elif self._is_hosted:
            self._size = len(model.get_input_embeddings().weight)
        if window is not None:
            check_int("Reader", "window", window, 1)
        if window is not None and not self._is_hosted:
            how = f"in segments of {model.config.segment_length}" if self._is_own else "as it does"
            raise ValueError(f"a window is for models of transformers; this one reads {how}")
        if self._is_own and isinstance(tokenizer, Bytes | Words):
            ours, theirs = tokenizer.vocab_size, model.config.vocab_size
            if ours != theirs:
                raise ValueError(f"the tokenizer has {ours} tokens, and the model {theirs}")

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        parameters = self.model.parameters() if isinstance(self.model, nn.Module) else ()
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    @property
    def knows_words_alone(self) -> bool:
        """Whether the tokens are words of a list."""
        return isinstance(self.tokenizer, Words)

    def layout(self) -> Layout:
        """How prompts are aligned with the model's segments.

        Raises:
            ValueError: it has none of its own, or tokens that say nothing of padding.
        """
        if not self._is_own or not isinstance(self.tokenizer, Bytes | Words):
            raise ValueError("aligned prompts are for models of train --tasks")
        return Layout(self.tokenizer, self.model.config.segment_length)

    def fingerprint(self) -> str:
        """Of the weights, and of what a memory's options are; "" of a function."""
        if not isinstance(self.model, nn.Module):
            return ""
        memory = self._memory()[1]
        options = self.model.config.to_dict() if self._is_own else getattr(memory, "options", {})
        # which backend computes is a matter of rounding
        return fingerprint(self.model, str({**options, "backend": None}))

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, with those that the tokenizer puts before it.

        Raises:
            ValueError: there are none, or words or tokens that the model does not know.
        """
        if self.knows_words_alone:
            known = set(self.tokenizer.words)
            unknown = [word for word in dict.fromkeys(text.split()) if word not in known]
            if unknown:
                more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
                raise ValueError(
                    f"the model knows {len(known)} words, and not {', '.join(unknown[:_NAMED])}"
                    f"{more}: ask it what it was trained on"
                )
        tokens = self.tokenizer.encode(text)
        if not tokens:
            raise ValueError("a prompt has no tokens")
        if self._size is not None and max(tokens) >= self._size:
            raise ValueError(
                f"the tokenizer says token {max(tokens)}, and the model has {self._size}: they do "
                f"not belong together"
            )
        return tokens

    def count(self, text: str) -> int:
        """How many tokens a text has within another."""
        if self.knows_words_alone:
            # of the plain form, whether the model knows the words or not
            return count_words(text)
        if self.adds_tokens:
            # verbose: of a text longer than the model takes there would be a warning
            return len(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))
        return len(self.tokenizer.encode(text))

    @property
    def adds_tokens(self) -> bool:
        """Whether the tokenizer is one of transformers, which have tokens that are no text."""
        return hasattr(self.tokenizer, "all_special_ids")

    def check(self, prompt: str, tokens: int = 20) -> None:
        """Raise ValueError unless the model can read a prompt and answer in so many tokens."""
        self._check_room(len(self.encode(prompt)), tokens)

    @torch.no_grad()
    def answer(self, prompts: Sequence[str], tokens: int | Sequence[int] = 20) -> list[str]:
        """What the model says after each prompt, up to its end token.

        Args:
            prompts: read together; of unequal lengths.
            tokens: of each answer at most; one number for all, or one for each.

        Raises:
            ValueError: a prompt does not fit.
        """
        rows = [self.encode(prompt) for prompt in prompts]
        limits = [tokens] * len(rows) if isinstance(tokens, int) else list(tokens)
        if not rows:
            return []
        ends, most = self.ends(), max(limits)
        check_int("Reader", "tokens", min(limits), 1)
        self._check_room(max(map(len, rows)), most)
        with self._evaluating():
            if self._is_hosted:
                said = self._by_windows(rows, most, ends)
            elif self._is_own and self._streams():
                said = self._from_state(rows, most, ends)
            else:
                said = self._by_calls(rows, most, ends)
        return [self._decode(row[:n], ends) for row, n in zip(said, limits, strict=True)]

    @torch.no_grad()
    def score(
        self, rows: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> list[tuple[float, bool]]:
        """How likely the last tokens of each row are, after those before them.

        Args:
            rows: of tokens.
            counts: how many of the last tokens of each row; fewer than it has.

        Returns:
            Of each row the sum of the natural logarithms of their probabilities, and whether each
            of them is the likeliest at its place.

        Raises:
            ValueError: a row does not fit.
        """
        for row, count in zip(rows, counts, strict=True):
            check_int("Reader", "counts", count, 1, len(row) - 1)
            self._check_room(len(row), 0)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        with self._evaluating():
            # rows of one length together: nothing is padded
            for places in _grouped(map(len, rows)):
                ids = torch.tensor([list(rows[place]) for place in places], device=self.device)
                total, likeliest = self._score(ids, [counts[place] for place in places])
                found_here = zip(total.tolist(), likeliest.tolist(), strict=True)
                for place, pair in zip(places, found_here, strict=True):
                    found[place] = pair
        return found

    def _score(self, ids: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        batch, length = ids.shape
        begin = length - torch.tensor(counts, device=ids.device)[:, None]
        total = torch.zeros(batch, dtype=torch.float64, device=ids.device)
        likeliest = torch.ones(batch, dtype=torch.bool, device=ids.device)
        place = 1  # of the token that a piece's first logits are of
        for piece in self._logits(ids):
            end = min(place + piece.shape[1], length)
            targets, logits = ids[:, place:end], piece[:, : end - place]
            counted = torch.arange(place, end, device=ids.device) >= begin
            logs = logits.double().log_softmax(-1).gather(-1, targets[:, :, None])[:, :, 0]
            total += logs.masked_fill(~counted, 0.0).sum(-1)
            likeliest &= ((logits.argmax(-1) == targets) | ~counted).all(-1)
            place = end
        return total, likeliest

    def _logits(self, ids: Tensor) -> Iterator[Tensor]:
        """Those of rows that are not padded, from a fresh memory on, piece by piece."""
        if self._is_own:
            memory, length = None, self.model.config.segment_length
            for piece in ids.split(max(_PIECE // length, 1) * length, dim=1):
                output = self.model(piece, memory=memory)
                memory = output.memory
                yield output.logits
        elif self._is_hosted:
            length = ids.shape[1]
            size = self.window or length
            # counted from the end, as those of answers
            first = length % size or size
            windows = ids.split([first, *[size] * ((length - first) // size)], dim=1)
            with _fresh(self._memory()[1], carry=len(windows) > 1):
                for window in windows:
                    yield self.model(input_ids=window, use_cache=False).logits
        else:
            output = self.model(ids)
            yield output if isinstance(output, Tensor) else output.logits

    def _decode(self, row: list[int], ends: Sequence[int]) -> str:
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        options = {"skip_special_tokens": True} if self.adds_tokens else {}
        return self.tokenizer.decode(row[:stop], **options)

    def ends(self) -> list[int]:
        """The tokens that end an answer."""
        found = getattr(self.tokenizer, "eos_token_id", None)
        if self._is_hosted and self.model.generation_config.eos_token_id is not None:
            found = self.model.generation_config.eos_token_id
        return [] if found is None else list(found) if isinstance(found, Sequence) else [found]

    def _check_room(self, longest: int, tokens: int) -> None:
        """Raise ValueError unless a model of transformers has places for so many tokens."""
        if not self._is_hosted:
            return
        room = getattr(self.model.config, "max_position_embeddings", None)
        read = longest if self.window is None else min(longest, self.window)
        if room is not None and read + tokens > room:
            what = "prompt" if self.window is None or longest <= self.window else "window"
            raise ValueError(
                f"a {what} of {read} tokens and {tokens} of the answer are more than the {room} "
                f"that the model takes: read it by smaller windows (--window)"
            )

    def _streams(self) -> bool:
        try:
            self.model.check_streaming()
        except ValueError:
            return False
        return True

    def _memory(self) -> tuple[nn.Module | None, AddedMemory | None]:
        """The decoder that has an added memory, and the memory."""
        modules = self.model.modules() if isinstance(self.model, nn.Module) else ()
        decoder = next((module for module in modules if hasattr(module, MEMORY)), None)
        return decoder, getattr(decoder, MEMORY, None)

    def _evaluating(self) -> contextlib.AbstractContextManager[None]:
        is_module = isinstance(self.model, nn.Module)
        return evaluating(self.model) if is_module else contextlib.nullcontext()

    def _padded(self, rows: Sequence[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        """Rows of tokens as (B, L), and where they are."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            place = slice(longest - len(row), None) if left else slice(len(row))
            ids[index, place] = torch.tensor(row)
            mask[index, place] = 1
        return ids.to(self.device), mask.to(self.device)

    def _from_state(self, rows: list[list[int]], tokens: int, ends: list[int]) -> list[list[int]]:
        ids, mask = self._padded(rows, left=True)
        generated = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, eos_token_id=ends or None
        )
        return generated.sequences[:, ids.shape[1] :].tolist()

    def _by_calls(self, rows: list[list[int]], tokens: int, ends: list[int]) -> list[list[int]]:
        said: list[list[int]] = [[]] * len(rows)
        # rows of one length together: what the model takes for padding nobody knows
        for places in _grouped(map(len, rows)):
            ids = torch.tensor([rows[place] for place in places], device=self.device)
            length = ids.shape[1]
            has_ended = torch.zeros(len(places), dtype=torch.bool, device=ids.device)
            for _ in range(tokens):
                output = self.model(ids)
                logits = output if isinstance(output, Tensor) else output.logits
                new = logits[:, -1].argmax(-1)
                ids = torch.cat([ids, new[:, None].to(ids.device)], dim=1)
                if ends:
                    has_ended |= torch.isin(ids[:, -1], torch.tensor(ends, device=ids.device))
                    if has_ended.all():
                        break
            for place, row in zip(places, ids[:, length:].tolist(), strict=True):
                said[place] = row
        return said

    def _by_windows(self, rows: list[list[int]], tokens: int, ends: list[int]) -> list[list[int]]:
        decoder, memory = self._memory()
        size = self.window or max(map(len, rows))
        said: list[list[int]] = [[]] * len(rows)
        # without a memory the last window alone is read
        counts = [1 if memory is None else math.ceil(len(row) / size) for row in rows]
        # rows of as many windows together: no row has a window of padding alone
        for places in _grouped(counts):
            group = [rows[place] for place in places]
            windows = counts[places[0]]
            with _fresh(memory, carry=windows > 1):
                for back in range(windows, 0, -1):
                    # counted from the end: the question stands in a whole window
                    parts = [
                        row[max(len(row) - back * size, 0) : len(row) - (back - 1) * size]
                        for row in group
                    ]
                    if back > 1:
                        # on the right, so that positions are those of the row alone
                        ids, mask = self._padded(parts, left=False)
                        decoder(input_ids=ids, attention_mask=mask, use_cache=False)
                        continue
                    for place, row in zip(places, self._go_on(parts, tokens, ends), strict=True):
                        said[place] = row
        return said

    def _go_on(self, rows: list[list[int]], tokens: int, ends: list[int]) -> list[list[int]]:
        """By the model's own ``generate``, which knows its cache and its positions."""
        ids, mask = self._padded(rows, left=True)
        # PEFT hands its own down to the model that it wraps
        owner = getattr(self.model, "get_base_model", lambda: self.model)()
        own = owner.generation_config
        # nothing of what the model would like: no sampling, no penalties
        owner.generation_config = type(own)(
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
        try:
            sequences = self.model.generate(input_ids=ids, attention_mask=mask)
        finally:
            owner.generation_config = own
        return sequences[:, ids.shape[1] :].tolist()


def _grouped(keys: Iterable[int]) -> list[list[int]]:
    """The places of equal keys."""
    groups: dict[int, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return list(groups.values())


@contextlib.contextmanager
def _fresh(memory: AddedMemory | None, *, carry: bool) -> Iterator[None]:
    """An added memory that remembers nothing, and afterwards what it did before."""
    if memory is None:
        yield
        return
    before = memory.carry, memory.state
    memory.carry, memory.state = carry, None
    try:
        yield
    finally:
        memory.carry, memory.state = before


def load_reader(
    model: str | Path,
    *,
    memory: str | Path | None = None,
    window: int | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> Reader:
    """A model on disk or on the Hugging Face Hub, as a reader.

    Args:
        model: a folder that :meth:`LM2ForCausalLM.save` wrote, with its tokenizer, as ``train`` and
            ``demo`` do; or one of a causal language model of ``transformers`` and its tokenizer.
            Or the name "user/model" of a repository.
        memory: the folder of a model that ``save_pretrained`` wrote with a memory, which this model
            is given (:func:`load_memory`); that in ``model`` itself unless given.
        window: see :class:`Reader`.
        device: where; the best there is unless given.
        dtype: of the weights; that in which they are loaded unless given.

    Raises:
        OSError: there is no such model.
        ValueError: it is damaged, or an option is not for it.
    """
    device = device or best_device()
    config = files.read_json(Place("evaluate", model).existing(files.CONFIG))
    if config.get("format") == files.FORMAT:
        if memory is not None:
            raise ValueError(f"{model} has its own memory: another is for models of transformers")
        own = LM2ForCausalLM.load(model, device=device, dtype=dtype)
        return Reader(own.eval(), load_tokenizer(model), window=window, prompt=_trained_on(model))
    host, tokenizer = _load_host(model)
    if memory is None and OPTIONS in config:
        memory = model
    if memory is not None:
        load_memory(host, memory)
    # not at once: of quantised weights a dtype is refused, even None
    host = host.to(device)
    return Reader((host if dtype is None else host.to(dtype)).eval(), tokenizer, window=window)


def _trained_on(name: str | Path) -> str | None:
    """The form of prompts that a model was trained on, if ``train`` says so beside it."""
    try:
        options = read_run(Path(name))["options"]
    except (OSError, ValueError):
        return None
    return {"aligned": "aligned", "running": "plain"}.get(options.get("layout"))


def _load_host(name: str | Path) -> tuple[nn.Module, object]:
    """A model of transformers, without a memory, and its tokenizer."""
    try:
        import transformers  # noqa: PLC0415 - what only its models need
    except ImportError:
        raise ValueError(
            f'{name} is a model of transformers: pip install "lm2_kernels[transformers]"'
        ) from None
    logs = transformers.logging
    before, has_bar = logs.get_verbosity(), logs.is_progress_bar_enabled()
    # of weights that it does not know, those of the memory, it would tell at length
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    part = "model"
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True
        )
        part = "tokenizer"
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:
        # of many kinds, some of them long; what is not whole says so anywhere in there
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
        raise ValueError(f"{name}: transformers cannot load its {part} ({why})") from None
    finally:
        logs.set_verbosity(before)
        if has_bar:
            logs.enable_progress_bar()
    if found["missing_keys"]:
        raise ValueError(f"{name} lacks weights: {', '.join(sorted(found['missing_keys'])[:4])}")
    return model, tokenizer
