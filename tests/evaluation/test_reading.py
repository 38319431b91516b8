"""Readers: what a row is answered is what it is answered alone, whatever was read before it."""

import functools
import json
import math

import pytest
import torch

from lm2_kernels import LM2ForCausalLM, add_memory, get_memory
from lm2_kernels.evaluation.reading import Reader, load_reader
from lm2_kernels.training.data import Bytes, Ids, Words, save_tokenizer
from tools import hosts
from tools.hosts import bare_llama, hosted, llama
from tools.models import SMALL, small_model

TOKENS = 4
WINDOW = 11  # no multiple of a segment of 6 or 8 tokens
# weights of which each answer is another
_SPREAD = {"initializer_range": 0.3}


def _words(size):
    return Words([f"w{number}" for number in range(size)])


def _prompts(count=4, seed=1, size=hosts.VOCABULARY):
    """Of 1 to 26 words: some shorter than a window, some of several."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, WINDOW, 2 * WINDOW + 1, *torch.randint(2, 27, (count,), generator=generator)]
    rows = [torch.randint(1, size, (int(n),), generator=generator).tolist() for n in lengths]
    return [" ".join(f"w{token}" for token in row) for row in rows]


def _own(**options):
    return Reader(small_model(**_SPREAD, **options).eval(), _words(SMALL["vocab_size"]))


def _function():
    model = small_model(**_SPREAD).eval()
    return Reader(functools.partial(_logits, model), _words(SMALL["vocab_size"]))


def _logits(model, ids):
    return model(ids).logits


def _hosted(kind=None, window=None):
    model = bare_llama(torch.float64) if kind is None else llama(kind, torch.float64)
    return Reader(model, _words(hosts.VOCABULARY), window=window)


OWN = {
    "depth": _own,
    "time": lambda: _own(flow="time", formulation="release"),
    "chunk": lambda: _own(flow="chunk"),
    "without memory": lambda: _own(memory_layers=()),
    "released gate": lambda: _own(formulation="release", pooled_gate="segment"),
    "function": _function,
}
HOSTED = {
    "patched": lambda: _hosted("paper"),
    "patched, windows": lambda: _hosted("paper", WINDOW),
    "patched, chunks, windows": lambda: _hosted("release-chunk", WINDOW),
    "plain": _hosted,
    "plain, windows": lambda: _hosted(None, WINDOW),
}
# which read all anew for every token
SLOW = ("released gate", "function")
READERS = [*OWN, *(pytest.param(name, marks=hosted) for name in HOSTED)]


def _reader(name):
    return {**OWN, **HOSTED}[name]()


@pytest.mark.parametrize("name", READERS)
def test_a_row_is_answered_as_alone(name):
    """In float64, where what rounding does to logits decides between no two tokens."""
    reader, prompts = _reader(name), _prompts()
    if name in SLOW:
        prompts = prompts[:4]
    alone = [reader.answer([prompt], TOKENS)[0] for prompt in prompts]
    assert len(set(alone)) > len(alone) // 2
    assert reader.answer(prompts, TOKENS) == alone
    # in another order, in other company
    assert reader.answer(prompts[::-1], TOKENS) == alone[::-1]
    assert reader.answer(prompts[3:5], TOKENS) == alone[3:5]
    # each has its own number of tokens
    limits = [1 + number % 3 for number in range(len(prompts))]
    said = reader.answer(prompts, limits)
    assert said == [" ".join(a.split()[:n]) for a, n in zip(alone, limits, strict=True)]


@torch.no_grad()
def _greedily(logits_of, ids):
    """By calls over the whole text."""
    for _ in range(TOKENS):
        new = logits_of(torch.tensor([ids]))[0, -1].argmax().item()
        ids = [*ids, new]
    return ids[-TOKENS:]


@pytest.mark.parametrize("name", ["depth", "time", "released gate", "without memory"])
def test_own_answers_are_the_likeliest_tokens(name):
    reader = _reader(name)
    for prompt in _prompts(2):
        ids = reader.encode(prompt)
        wanted = _greedily(functools.partial(_logits, reader.model), ids)
        assert reader.answer([prompt], TOKENS) == [reader.tokenizer.decode(wanted)]


def _by_windows(model, starts, text):
    memory = get_memory(model)
    memory.carry = True
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        logits = model(text[:, start:end], use_cache=False).logits
    memory.carry = False
    memory.reset()
    return logits


@hosted
@pytest.mark.parametrize("kind", [None, "paper"])
@pytest.mark.parametrize("window", [None, WINDOW])
@torch.no_grad()
def test_hosted_answers_are_the_likeliest_tokens(kind, window):
    reader = _hosted(kind, window)
    for prompt in _prompts(2):
        ids = reader.encode(prompt)
        size = window or len(ids)
        first = len(ids) - (math.ceil(len(ids) / size) - 1) * size
        starts = [0, *range(first, len(ids), size)]
        if kind is None:
            # what came before the last window is lost
            wanted = _greedily(functools.partial(_logits, reader.model), ids[-size:])
        else:
            wanted = _greedily(functools.partial(_by_windows, reader.model, starts), ids)
        assert reader.answer([prompt], TOKENS) == [reader.tokenizer.decode(wanted)]


@hosted
def test_windows_carry_the_memory():
    """What stands before the last window changes the answers, by the memory alone."""
    prompts = _prompts()
    tails = [" ".join(prompt.split()[-WINDOW:]) for prompt in prompts]
    patched, plain = _hosted("paper", WINDOW), _hosted(None, WINDOW)
    assert plain.answer(prompts, TOKENS) == plain.answer(tails, TOKENS)
    assert patched.answer(prompts, TOKENS) != patched.answer(tails, TOKENS)


@hosted
def test_places_are_those_of_the_row_alone():
    """Of a host that knows places by their numbers, which padding in front would move."""
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 56):
        pytest.skip(f"GPT-2 of transformers {transformers.__version__} keeps its cache in tuples")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=hosts.VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4,
        initializer_range=0.3, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double().eval()
    for layer in add_memory(model, memory_slots=hosts.SLOTS, num_heads=4).memory.layers:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    for window in (WINDOW, None):
        reader = Reader(model, _words(hosts.VOCABULARY), window=window)
        # of two windows each, of which the first is of another length
        prompts = [" ".join(_prompts()[2].split()[:number]) for number in (12, 14, 19, 21)]
        alone = [reader.answer([prompt], TOKENS)[0] for prompt in prompts]
        assert reader.answer(prompts, TOKENS) == alone
        tails = [" ".join(prompt.split()[-WINDOW:]) for prompt in prompts]
        assert reader.answer(tails, TOKENS) != alone


@hosted
@pytest.mark.parametrize("window", [None, WINDOW])
def test_what_a_model_carries_stays_its_own(window):
    reader, prompts = _hosted("paper", window), _prompts()
    wanted = reader.answer(prompts, TOKENS)
    memory = get_memory(reader.model)
    memory.carry = True
    reader.model(hosts.tokens(len(prompts), 20))
    before = memory.state
    # a conversation that is under way is not asked, and goes on afterwards
    assert reader.answer(prompts, TOKENS) == wanted
    assert memory.carry
    for got, want in zip(memory.state.banks, before.banks, strict=True):
        assert torch.equal(got, want)


@hosted
def test_what_a_model_would_like_is_ignored():
    """Sampling and penalties of its generation_config, which stays as it was."""
    reader, prompts = _hosted("paper"), _prompts()
    wanted = reader.answer(prompts, TOKENS)
    own = reader.model.generation_config
    own.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_length=3)
    assert reader.answer(prompts, TOKENS) == wanted
    assert reader.model.generation_config is own
    assert own.do_sample


@pytest.mark.parametrize("name", ["depth", "function", pytest.param("patched", marks=hosted)])
def test_an_end_token_ends_a_row(name):
    reader, prompts = _reader(name), _prompts()
    said = [answer.split() for answer in reader.answer(prompts, TOKENS)]
    end = said[0][1]
    reader.tokenizer.eos_token_id = reader.encode(end)[0]
    wanted = [" ".join(row[: row.index(end)] if end in row else row) for row in said]
    assert any(len(row.split()) < TOKENS for row in wanted)
    assert reader.answer(prompts, TOKENS) == wanted


def test_the_model_is_left_as_it_was():
    reader = _own(memory_dropout=0.5)
    reader.model.train()
    prompts = _prompts(2)
    assert reader.answer(prompts, TOKENS) == reader.answer(prompts, TOKENS)
    assert reader.model.training
    assert reader.answer([]) == []


def test_tokens_are_counted_as_the_model_reads_them():
    assert Reader(len, Bytes()).count("Éa.") == 4
    # of words in the plain form, known or not
    assert Reader(len, _words(3)).count("Mary went home.") == 4


def test_fingerprints_tell_models_apart():
    words = _words(SMALL["vocab_size"])
    models = [small_model(), small_model(backend="eager"), small_model(seed=1)]
    # the same weights in other segments
    models.append(small_model(segment_length=4))
    prints = [Reader(model, words).fingerprint() for model in models]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert Reader(len, words).fingerprint() == ""


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Reader(small_model(), Ids()), "give the tokenizer"),
        (lambda: Reader(small_model(), Bytes()), "the tokenizer has 256 tokens, and the model 61"),
        (lambda: Reader(small_model(), _words(61), window=8), "this one reads in segments of 6"),
        (lambda: Reader(len, _words(61), window=8), "a window is for models of transformers"),
        (lambda: Reader(len, _words(61), window=0), "window must be at least 1"),
        (lambda: Reader(len, _words(61)).answer([" "]), "no tokens"),
        (lambda: Reader(len, _words(61)).answer(["w1"], 0), "tokens must be at least 1"),
        (
            lambda: Reader(len, _words(2)).answer(["w1 w2 w3 w2 w0"]),
            "the model knows 2 words, and not w2, w3: ask it what it was trained on",
        ),
        (
            lambda: Reader(len, _words(1)).encode(" ".join(f"w{n}" for n in range(12))),
            "w8 and 3 more",
        ),
    ],
)
def test_what_does_not_go_together(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@hosted
def test_room():
    """bare_llama has 128 places."""
    long = " ".join(["w1"] * 124)
    assert _hosted().answer([long], 4)
    with pytest.raises(ValueError, match=r"prompt of 124 tokens and 5 .* 128 .*--window"):
        _hosted().answer([long], 5)
    with pytest.raises(ValueError, match="window of 128 tokens"):
        _hosted("paper", 128).answer([f"{long} {long}"], 1)
    assert _hosted("paper", 64).answer([f"{long} {long}"], 64)


# --- on disk -----------------------------------------------------------------------------------


def _save_llama(model, folder):
    """With a tokenizer of the words w0, w1, ... in the form of transformers."""
    import tokenizers
    import transformers

    vocabulary = {f"w{number}": number for number in range(hosts.VOCABULARY)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def test_load_own(tmp_path):
    reader = _own()
    reader.model.save(tmp_path)
    save_tokenizer(tmp_path, reader.tokenizer)
    loaded = load_reader(str(tmp_path), device="cpu")
    assert isinstance(loaded.model, LM2ForCausalLM)
    assert loaded.fingerprint() == reader.fingerprint()
    assert loaded.answer(_prompts(), TOKENS) == reader.answer(_prompts(), TOKENS)
    half = load_reader(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="has its own memory"):
        load_reader(tmp_path, memory=tmp_path)
    (tmp_path / "lm2_tokenizer.json").unlink()
    with pytest.raises(ValueError, match="give the tokenizer"):
        load_reader(tmp_path)


@hosted
def test_load_hosts(tmp_path):
    options = {"device": "cpu", "window": WINDOW}
    prompts, wanted = _prompts(), {}
    for name, model in (("bare", bare_llama()), ("memory", llama())):
        _save_llama(model, tmp_path / name)
        # of words between blanks, as ours
        wanted[name] = Reader(model, _words(hosts.VOCABULARY), window=WINDOW).answer(
            prompts, TOKENS
        )
    assert wanted["bare"] != wanted["memory"]
    bare = load_reader(tmp_path / "bare", **options)
    assert bare.count(prompts[2]) == len(prompts[2].split())
    assert bare.answer(prompts, TOKENS) == wanted["bare"]
    # a model and a memory from two folders, or both from one
    for folder, memory in (("bare", tmp_path / "memory"), ("memory", None)):
        reader = load_reader(tmp_path / folder, memory=memory, **options)
        assert reader.answer(prompts, TOKENS) == wanted["memory"]
        assert get_memory(reader.model).options["memory_slots"] == hosts.SLOTS
    with pytest.raises(ValueError, match="has no 'lm2_memory'"):
        load_reader(tmp_path / "memory", memory=tmp_path / "bare")


def test_load_nothing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_reader(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ValueError, match=r'pip install "lm2_kernels\[transformers\]"'):
        load_reader(tmp_path)


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def _other_shapes(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 8}))


def _no_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


def _empty_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


@hosted
@pytest.mark.parametrize(
    "damage, part",
    [
        (_cut, "model"),
        (_other_shapes, "model"),
        (_no_tokenizer, "tokenizer"),
        (_empty_tokenizer, "tokenizer"),
    ],
)
def test_damaged_hosts(tmp_path, damage, part):
    _save_llama(bare_llama(), tmp_path)
    damage(tmp_path)
    with pytest.raises(
        ValueError, match=f"{tmp_path}: transformers cannot load its {part} "
    ) as got:
        load_reader(tmp_path, device="cpu")
    assert len(str(got.value).splitlines()) == 1


@hosted
def test_a_tokenizer_of_another_host():
    reader = Reader(bare_llama(), _words(hosts.VOCABULARY + 1))
    assert reader.encode("w1")
    last = f"w{hosts.VOCABULARY}"
    with pytest.raises(ValueError, match=f"token {hosts.VOCABULARY}, .* has {hosts.VOCABULARY}:"):
        reader.check(last)
