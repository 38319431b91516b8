"""A pass through a patched model is its caller's alone: threads, nested calls, ends by surprise."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lm2_kernels import add_memory, get_memory
from tools.hosts import SLOTS, bare_llama, hosted, llama, new_cache, padded, tokens, transformers

pytestmark = hosted


def _run_in_threads(works, times):
    """Each in a thread of its own, all begun at once. Raises what one of them raised."""
    errors, gate = [], threading.Barrier(len(works))

    def run(work):
        try:
            gate.wait()
            for _ in range(times):
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _read(model, ids):
    """In pieces, with a cache of its own."""
    cache = new_cache()
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(5, dim=1)]
    return torch.cat(pieces, dim=1)


def _learn(model, ids):
    """The gradients of the memory, of a pass that recomputes its blocks or not."""
    leaves = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(model(ids).logits.sum(), leaves)])


def _around(model, ids):
    return checkpoint(lambda ids: model(ids, use_cache=False).logits, ids, use_reentrant=False)


def _around_reentrant(model, ids):
    zero = torch.zeros((), requires_grad=True)
    return checkpoint(
        lambda ids, zero: model(ids, use_cache=False).logits + zero, ids, zero, use_reentrant=True
    )


def _around_decoder(model, ids):
    run = lambda ids: model.model(ids, use_cache=False).last_hidden_state  # noqa: E731
    return model.lm_head(checkpoint(run, ids, use_reentrant=False))


@pytest.mark.parametrize("around", (_around, _around_reentrant, _around_decoder))
def test_a_checkpoint_around_the_model(around):
    """Backward runs a whole pass, which is no recomputation of blocks."""
    model, ids = llama().train(), tokens()
    leaves = [p for p in model.parameters() if p.requires_grad]
    # as what is checkpointed: with a cache a part of a segment is made of ops, whose gradients are
    # the same to round-off alone
    model(ids, use_cache=False).logits.sum().backward()
    want = [leaf.grad for leaf in leaves]
    model.zero_grad()
    around(model, ids).sum().backward()
    for leaf, gradient in zip(leaves, want, strict=True):
        assert torch.equal(leaf.grad, gradient)
    memory = get_memory(model)
    memory.carry = True
    model(ids)
    with pytest.raises(RuntimeError, match="checkpoint blocks and not the model"):
        around(model, ids).sum().backward()
    memory.reset()
    memory.carry = False
    model.zero_grad()
    around(model, ids).sum().backward()
    for leaf, gradient in zip(leaves, want, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_a_pass_with_gradients_within_backward():
    model, ids, got = llama().train(), tokens(), []
    logits = model(ids).logits

    def hook(gradient):
        with torch.enable_grad():
            got.append(model(ids).logits)

    logits.register_hook(hook)
    logits.sum().backward()
    assert torch.equal(got[0], logits)


def _generate(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("formulation", ("paper", "release"))
@pytest.mark.parametrize("what", ("read", "read with gradients", "learn", "recompute", "generate"))
def test_threads_share_a_model(what, formulation):
    """Every thread gets what it gets alone."""
    model = llama(formulation)
    function = {"learn": _learn, "recompute": _learn, "generate": _generate}.get(what, _read)
    if what == "recompute":
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    is_learning = what in ("read with gradients", "learn", "recompute")
    inputs = [tokens(2, 12 + 3 * index, seed=index) for index in range(4)]

    def run(ids):
        with torch.set_grad_enabled(is_learning):
            return function(model, ids).detach()

    wants = [run(ids) for ids in inputs]

    def check(ids, want):
        assert torch.equal(run(ids), want)

    works = [lambda i=i, w=w: check(i, w) for i, w in zip(inputs, wants, strict=True)]
    _run_in_threads(works, 8)


@pytest.mark.parametrize("is_learning", (False, True))
def test_a_model_is_called_within_a_pass(is_learning):
    """From a hook of the same model, as a distillation or a probe does it."""
    model, outer, inner = llama(), tokens(), tokens(1, 11, seed=2)
    with torch.set_grad_enabled(is_learning):
        wants, got = [model(ids).logits for ids in (outer, inner)], []

    def call(module, args, output):
        if not got:
            got.append(None)
            got[0] = model(inner).logits

    handle = model.model.layers[0].register_forward_hook(call)
    with torch.set_grad_enabled(is_learning):
        result = model(outer).logits
    handle.remove()
    assert torch.equal(result, wants[0]) and torch.equal(got[0], wants[1])


def test_backward_within_a_pass():
    """Blocks that it recomputes are those of the pass that it goes through."""
    model, first, second = llama().train(), tokens(), tokens(2, 13, seed=2)
    leaves = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(first, use_cache=False).logits.sum(), leaves)
    want_logits = model(second).logits
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, got = model(first, use_cache=False).logits.sum(), []

    def differentiate(module, args):
        if not got:
            got.append(None)
            got[:] = torch.autograd.grad(loss, leaves)

    handle = model.model.norm.register_forward_pre_hook(differentiate)
    logits = model(second, use_cache=False).logits
    handle.remove()
    assert torch.equal(logits, want_logits)
    for gradient, wanted in zip(got, want, strict=True):
        assert torch.equal(gradient, wanted)


@pytest.mark.parametrize("error", (ZeroDivisionError, KeyboardInterrupt))
@pytest.mark.parametrize("where", ("before", "block"))
def test_a_pass_that_ends_early_leaves_nothing(error, where):
    """Ctrl-C too, of which torch tells no hook; in mid-pass, and before the pass has begun."""
    model, ids = llama(), tokens()
    want = model(ids).logits

    def fail(*_):
        raise error

    module = model.model if where == "before" else model.model.layers[1]
    handle = module.register_forward_pre_hook(fail, prepend=True)
    for _ in range(2):
        with pytest.raises(error):
            model(ids)
    handle.remove()
    assert torch.equal(model(ids).logits, want)
    assert get_memory(model)._local.call is None
    with pytest.raises(RuntimeError, match="runs by itself"):
        model.model.layers[0].self_attn(
            torch.zeros(1, 3, 32),
            position_embeddings=(torch.ones(1, 3, 8), torch.ones(1, 3, 8)),
            attention_mask=None,
        )


def test_nothing_of_a_pass_outlives_it():
    """Neither states nor graphs hang on the model."""
    model, ids = llama(), tokens()
    model(ids).logits.sum().backward()
    memory = get_memory(model)
    assert memory._local.call is None and memory.state is None
    assert not memory._recorded


def test_data_parallel_is_refused_by_its_name():
    model = llama()
    model.model._is_replica = True
    with pytest.raises(RuntimeError, match="DataParallel"):
        model(tokens())


def test_reentrant_checkpoints_of_a_frozen_host_say_what_to_do():
    """As transformers 4.51's Trainer has them; torch alone says "does not require grad"."""
    model, ids = bare_llama().train(), tokens()
    add_memory(model, memory_slots=SLOTS, num_heads=4)
    for block in model.model.layers:
        call = block.forward
        block.forward = lambda x, call=call, **options: checkpoint(
            lambda x: call(x, **options), x, use_reentrant=True
        )
    with pytest.raises(RuntimeError, match="enable_input_require_grads"):
        model(ids, labels=ids, use_cache=False)
    with torch.no_grad():
        model(ids)
    model.enable_input_require_grads()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in get_memory(model).layers[0].parameters())


def test_continuous_batching_is_refused_where_it_shows():
    model = llama()
    for name in ("generate_batch", "init_continuous_batching"):
        if not hasattr(type(model), name):
            pytest.skip("transformers has no continuous batching")
        with pytest.raises(NotImplementedError, match="continuous batching"):
            getattr(model, name)([[1, 2, 3]])

    class PagedAttentionCache:
        pass

    with pytest.raises(TypeError, match="a PagedAttentionCache holds several"):
        model(tokens(), past_key_values=PagedAttentionCache())


def test_generation_is_not_compiled():
    """transformers compiles a static cache's steps on a GPU, and chunks of a prompt anywhere."""
    from lm2_kernels import remove_memory

    model, ids = llama(), tokens()
    if not hasattr(model, "get_compiled_call"):
        pytest.skip("transformers does not compile")
    assert model.get_compiled_call(None) == model.__call__
    want = model.generate(ids, max_new_tokens=10, do_sample=False)
    ways = [{"cache_implementation": "static"}]
    if hasattr(transformers.GenerationConfig(), "prefill_chunk_size"):
        ways.append({"prefill_chunk_size": 7})
    for options in ways:
        got = model.generate(ids, max_new_tokens=10, do_sample=False, **options)
        assert torch.equal(got, want)
    remove_memory(model)
    assert not {"get_compiled_call", "generate_batch"} & model.__dict__.keys()


@pytest.mark.parametrize(
    "options",
    (
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "hybrid"},
        {"cache_implementation": "sliding_window"},
    ),
    ids=str,
)
def test_ways_to_generate(options):
    """What is supported gives what generation without a cache gives."""
    model, ids = llama(dtype=torch.float64), tokens()

    def run(**more):
        torch.manual_seed(0)
        basis = {"max_new_tokens": 12, "do_sample": False, "attention_mask": padded()}
        return model.generate(ids, **{**basis, **more})

    try:
        got = run(**options)
    except (ValueError, AttributeError) as error:
        pytest.skip(f"transformers has it not for this host: {error}")
    options = {k: v for k, v in options.items() if k != "cache_implementation"}
    assert torch.equal(got, run(**options, use_cache=False))
