"""The adapter to lm-evaluation-harness, by a small stand-in for its classes."""

import abc
import sys
import types

import pytest
import torch

from lm2_kernels import LM2ForCausalLM
from lm2_kernels.evaluation import lm_eval as adapter
from lm2_kernels.evaluation.reading import Reader
from lm2_kernels.training.data import Bytes, Words, save_tokenizer
from tools import hosts
from tools.hosts import bare_llama, hosted, llama
from tools.models import SMALL, small_model

WINDOW = 11


class TemplateLM(abc.ABC):
    """What the harness's class asks of those below it, and what it does for them."""

    @property
    @abc.abstractmethod
    def eot_token_id(self): ...

    @abc.abstractmethod
    def tok_encode(self, string, **kwargs): ...

    @abc.abstractmethod
    def _loglikelihood_tokens(self, requests, **kwargs): ...

    @abc.abstractmethod
    def loglikelihood_rolling(self, requests, disable_tqdm=False): ...

    @abc.abstractmethod
    def generate_until(self, requests, disable_tqdm=False): ...

    def loglikelihood(self, requests, disable_tqdm=False):
        encoded = []
        for context, continuation in (request.args for request in requests):
            before = self.tok_encode(context) if context else [self.eot_token_id]
            whole = self.tok_encode(context + continuation)
            after = whole[len(before) :] if context else whole
            encoded.append(((context, continuation), before, after))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)


@pytest.fixture
def registered(monkeypatch):
    """The stand-in as ``lm_eval``; what was registered."""
    found = {}

    def register_model(name):
        return lambda kind: found.setdefault(name, kind)

    for name, content in (
        ("lm_eval", {}),
        ("lm_eval.api", {}),
        ("lm_eval.api.model", {"TemplateLM": TemplateLM}),
        ("lm_eval.api.registry", {"register_model": register_model}),
    ):
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    adapter.harness_class.cache_clear()
    yield found
    adapter.harness_class.cache_clear()


def _request(*args):
    return types.SimpleNamespace(args=args)


def _model(**options):
    return small_model(vocab_size=256, initializer_range=0.3, **options).eval()


PAIRS = [("The memory", " reads"), ("", "what it wrote"), ("a" * 40, "b"), ("The memory", " lost")]


@torch.no_grad()
def _wanted(model, context, continuation):
    text = list((context or "\n").encode()) + list(continuation.encode())
    logs = model(torch.tensor([text])).logits[0].log_softmax(-1)
    places = range(len(text) - len(continuation), len(text))
    total = sum(logs[place - 1, text[place]].item() for place in places)
    return total, all(logs[place - 1].argmax().item() == text[place] for place in places)


@pytest.mark.parametrize(
    "options", [{}, {"flow": "chunk"}, {"formulation": "release", "pooled_gate": "segment"}]
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods(registered, monkeypatch, options, batch_size):
    """In pieces of one segment, whatever else is asked."""
    from lm2_kernels.evaluation import reading

    monkeypatch.setattr(reading, "_PIECE", 7)
    model = _model(**options)
    asked = adapter.harness_model(Reader(model, Bytes()), batch_size)
    assert isinstance(asked, registered["lm2_kernels"])
    # what the model says itself, where its byte is text
    said = (
        (text, asked.reader.answer([text], 1)[0]) for text in map("by {:c}".format, range(33, 126))
    )
    pairs = [*PAIRS, next(pair for pair in said if pair[1].isascii())]
    for order in (pairs, pairs[::-1]):
        found = asked.loglikelihood([_request(*pair) for pair in order])
        for (total, is_greedy), pair in zip(found, order, strict=True):
            want, is_likeliest = _wanted(model, *pair)
            assert total == pytest.approx(want)
            assert is_greedy == is_likeliest == (pair == pairs[-1])
    texts = ["what it wrote", "a" * 30]
    found = asked.loglikelihood_rolling([_request(text) for text in texts])
    assert found == pytest.approx([_wanted(model, "", text)[0] for text in texts])


def test_functions_are_scored_too():
    model = small_model().eval()
    words = Words([f"w{number}" for number in range(SMALL["vocab_size"])])
    row = [*range(1, 30)]
    found = [
        Reader(kind, words).score([row, row], [3, 28])
        for kind in (model, lambda ids: model(ids).logits)
    ]
    assert found[0] == [pytest.approx(pair) for pair in found[1]]
    for count in (0, 29):
        with pytest.raises(ValueError, match="counts must be between 1 and 28"):
            Reader(model, words).score([row], [count])


@hosted
@torch.no_grad()
def test_hosts_are_scored_by_windows():
    words = Words([f"w{number}" for number in range(hosts.VOCABULARY)])
    rows = [hosts.tokens(1, length, seed=length)[0].tolist() for length in (5, 30, 22, 30)]
    counts = [4, 20, 3, 1]
    for model in (bare_llama(torch.float64), llama("paper", torch.float64)):
        whole = Reader(model, words).score(rows, counts)
        for (total, _), row, count in zip(whole, rows, counts, strict=True):
            logs = model(torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
            want = sum(logs[p - 1, row[p]].item() for p in range(len(row) - count, len(row)))
            assert total == pytest.approx(want)
    reader = Reader(model, words, window=WINDOW)
    found = reader.score(rows, counts)
    assert [pytest.approx(pair) for pair in found] == [
        reader.score([row], [count])[0] for row, count in zip(rows, counts, strict=True)
    ]
    # what was said is the likeliest after its prompt, read by the same windows
    prompt = rows[1][: 2 * WINDOW]
    said = reader.encode(reader.answer([words.decode(prompt)], 1)[0])
    # one token more moves all windows by one: of whole windows and a first one of a single token
    total, _ = reader.score([[*prompt, *said]], [1])[0]
    memory = reader._memory()[1]
    memory.carry = True
    text = torch.tensor([[*prompt, *said]])
    for start, end in ((0, 1), (1, WINDOW + 1), (WINDOW + 1, None)):
        logits = model(text[:, start:end], use_cache=False).logits
    assert total == pytest.approx(logits[0, -2].log_softmax(-1)[said[0]].item())


def test_answers_end_where_a_task_says(registered):
    model = _model()
    asked = adapter.harness_model(Reader(model, Bytes()), 2)
    prompts = ["The memory", "reads", "a" * 30]
    whole = asked.reader.answer(prompts, 9)
    end = whole[0][4]
    options = {"until": ["", "\0\0", end], "max_gen_toks": 9, "do_sample": False}
    found = asked.generate_until([_request(prompt, options) for prompt in prompts])
    assert found == [text.partition(end)[0] for text in whole]
    assert len(found[0]) < len(whole[0])
    alone = asked.generate_until([_request(prompts[2], {"until": end, "max_gen_toks": 3})])
    assert alone == [asked.reader.answer(prompts[2:], 3)[0].partition(end)[0]]
    with pytest.raises(NotImplementedError, match="do_sample must be False"):
        asked.generate_until([_request("a", {"do_sample": True})])


def test_folders(registered, tmp_path):
    _model().float().save(tmp_path)
    save_tokenizer(tmp_path, Bytes())
    kind = adapter.harness_class()
    # as the harness makes a model of its command line, with options of its own
    asked = kind(pretrained=str(tmp_path), batch_size="4", max_batch_size=None, device="cpu")
    assert isinstance(asked.reader.model, LM2ForCausalLM)
    assert asked.batch_size == 4
    assert kind(pretrained=asked.reader, batch_size="auto:4").batch_size == 8
    with pytest.raises(ValueError, match="the model knows words alone"):
        adapter.harness_model(Reader(len, Words(["a"])))


def test_without_the_harness(monkeypatch):
    adapter.harness_class.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match="pip install lm_eval"):
        adapter.harness_model(Reader(len, Bytes()))
