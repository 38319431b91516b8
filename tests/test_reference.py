"""The oracle: against numbers worked out by hand, golden tensors, and PyTorch's attention."""

import math

import pytest
import torch
import torch.nn.functional as F

from lm2_kernels import reference, testing
from tools import golden
from tools.rounding import assert_round_off

LN3 = math.log(3.0)  # sigmoid(ln 3) = 3/4, and exp(ln 3) = 3


def bank(*values: float) -> torch.Tensor:
    """Slots or tokens of one batch, one head, width 1. (1, n, 1, 1)"""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def rows(*values: float) -> torch.Tensor:
    """Tokens of one batch and width 1. (1, n, 1)"""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_same(got: torch.Tensor, by_hand: torch.Tensor) -> None:
    comparison = testing.compare("output", got, by_hand.double(), by_hand)
    assert comparison.passed, (comparison, got, by_hand)


# --- by hand ----------------------------------------------------------------------------------


def test_visible_slots_by_hand():
    mask = torch.tensor([[True, True, False, True]])
    visible = reference.visible_slots(2, 4, slot_offset=1, slot_mask=mask)
    assert visible.tolist() == [[[[True, True, False, False], [True, True, False, False]]]]
    visible = reference.visible_slots(2, 3, slot_offset=1)
    assert visible.tolist() == [[[[True, True, False], [True, True, True]]]]
    assert reference.visible_slots(2, 3, causal=False).all()


def test_memory_attention_by_hand():
    # scores of token 1 are 0 and ln 3, probabilities 1/4 and 3/4; token 0 sees slot 0 alone
    tensors = bank(1.0, 1.0), bank(0.0, LN3), bank(8.0, 4.0)
    assert_same(reference.memory_attention(*tensors), bank(8.0, 5.0))
    assert_same(reference.memory_attention(*tensors, causal=False), bank(5.0, 5.0))
    assert_same(reference.memory_attention(*tensors, slot_offset=1), bank(5.0, 5.0))
    # -ln 3 turns the probabilities round
    assert_same(reference.memory_attention(*tensors, scale=-1.0), bank(8.0, 7.0))


def test_memory_attention_top_k_is_not_renormalised_by_hand():
    tensors = bank(1.0, 1.0), bank(0.0, LN3), bank(8.0, 4.0)
    assert_same(reference.memory_attention(*tensors, top_k=1), bank(8.0, 3.0))


def test_memory_attention_dropout_by_hand():
    tensors = bank(1.0, 1.0), bank(0.0, LN3), bank(8.0, 4.0)
    keep = torch.tensor([[False, True], [True, False]]).view(1, 1, 2, 2)
    result = reference.memory_attention(*tensors, dropout_p=0.5, keep_mask=keep)
    assert_same(result, bank(0.0, 4.0))


def test_memory_attention_mask_by_hand():
    tensors = bank(1.0, 1.0), bank(math.nan, LN3), bank(math.inf, 4.0)
    mask = torch.tensor([[False, True]])
    # token 0 sees nothing and reads 0; token 1 sees slot 1 alone
    assert_same(reference.memory_attention(*tensors, slot_mask=mask), bank(0.0, 4.0))


def test_memory_attention_scale_defaults_to_the_head_width():
    # K = 4: scores (2 ln 3, 0) / sqrt(4), probabilities 3/4 and 1/4
    query = torch.tensor([2.0 * LN3, 0.0, 0.0, 0.0], dtype=torch.float64).view(1, 1, 1, 4)
    key = torch.eye(4, dtype=torch.float64)[:2].view(1, 2, 1, 4)
    value = 4.0 * torch.eye(4, dtype=torch.float64)[:2].view(1, 2, 1, 4)
    result = reference.memory_attention(query, key, value, causal=False)
    assert_same(result, vector(3.0, 1.0, 0.0, 0.0).view(1, 1, 1, 4))


def test_memory_update_by_hand():
    # M' = 1/2 * tanh(atanh(1/2)) + 3/4 * 2 = 7/4
    hidden, candidate, memory = rows(1.0), rows(math.atanh(0.5)), rows(2.0)
    gates = rows(0.0), rows(LN3)
    output, new_memory = reference.memory_update(hidden, candidate, memory, *gates)
    assert_same(new_memory, rows(1.75))
    assert_same(output, rows(2.75))


def test_memory_update_output_gate_by_hand():
    hidden, candidate, memory = rows(1.0), rows(4.0), rows(2.0)
    gates = rows(0.0), rows(LN3), rows(LN3)
    output, _ = reference.memory_update(hidden, candidate, memory, *gates)
    assert_same(output, rows(1.0 + 0.75 * 4.0))
    output, _ = reference.memory_update(hidden, candidate, memory, *gates, output="memory")
    assert_same(output, rows(1.0 + 0.75 * 2.0))


def test_memory_update_gate_bias_by_hand():
    # the bias is [input | forget]: gates become 0 and ln 3
    tensors = rows(1.0, 1.0), rows(math.atanh(0.5), 0.0), rows(2.0, 4.0)
    bias = torch.tensor([2.0, LN3 - 1.0], dtype=torch.float64).view(1, 1, 2)
    output, new_memory = reference.memory_update(*tensors, rows(-2.0), rows(1.0), gate_bias=bias)
    assert_same(new_memory, rows(1.75, 3.0))
    assert_same(output, rows(2.75, 4.0))


def test_memory_update_read_by_hand():
    # what is shown is not what is written: 1 + 3/4 * 8, and 1/2 * 1/2 + 3/4 * 2
    hidden, candidate, memory = rows(1.0), rows(math.atanh(0.5)), rows(2.0)
    gates = rows(0.0), rows(LN3), rows(LN3)
    output, new_memory = reference.memory_update(hidden, candidate, memory, *gates, read=rows(8.0))
    assert_same(output, rows(7.0))
    assert_same(new_memory, rows(1.75))


def test_memory_update_of_several_tokens_by_hand():
    """Tokens 0 and 1 are bound to the first row, token 2 alone to the second."""
    tokens = rows(1.0, 1.0, 1.0), rows(math.atanh(0.5), 0.0, math.atanh(0.5))
    # proposals 1/4 + 6/4, 0 + 6/4 and 1/4 + 12/4
    output, new_memory = reference.memory_update(
        *tokens, rows(2.0, 4.0), rows(0.0), rows(LN3), tokens_per_slot=2
    )
    assert_same(new_memory, rows(1.625, 3.25))
    assert_same(output, rows(2.75, 2.5, 4.25))
    # gates and bias of slots: the second has (ln 3, 0), so 3/4 * 1/2 + 1/2 * 4
    bias = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]], dtype=torch.float64)
    output, new_memory = reference.memory_update(
        *tokens,
        rows(2.0, 4.0),
        rows(-1.0, LN3),
        rows(LN3 - 2.0, 0.0),
        gate_bias=bias,
        tokens_per_slot=2,
    )
    assert_same(new_memory, rows(1.625, 2.375))
    assert_same(output, rows(2.75, 2.5, 3.375))
    # an output gate of 1/2, 3/4 and 1/2 shows each token the row that it is bound to
    output, _ = reference.memory_update(
        *tokens,
        rows(2.0, 4.0),
        rows(0.0),
        rows(LN3),
        rows(0.0, LN3, 0.0),
        output="memory",
        tokens_per_slot=2,
    )
    assert_same(output, rows(2.0, 2.5, 3.0))


def test_memory_update_of_fewer_tokens_than_a_slot_takes_by_hand():
    # (7/4 + 6/4) / 2: what did not come does not count
    tokens = rows(0.0, 0.0), rows(math.atanh(0.5), 0.0)
    _, new_memory = reference.memory_update(
        *tokens, rows(2.0), rows(0.0), rows(LN3), tokens_per_slot=5
    )
    assert_same(new_memory, rows(1.625))


def test_residual_layer_norm_by_hand():
    # the sum is (1, 5): mean 3, variance 4, and sqrt(4 + 5) = 3
    x = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64)
    residual = torch.tensor([[[0.0, 3.0]]], dtype=torch.float64)
    result = reference.residual_layer_norm(x, residual, vector(3.0, 6.0), vector(1.0, 1.0), 5.0)
    assert_same(result, torch.tensor([[[-1.0, 5.0]]], dtype=torch.float64))


def test_pooled_gate_of_a_segment_by_hand():
    pooled, total = reference.pooled_gate(rows(1.0, -2.0, 3.0), vector(2.0))
    assert_same(pooled, rows(8.0 / 3.0))
    assert_same(total, torch.tensor([[8.0]]).double())


def test_pooled_gate_of_a_prefix_by_hand():
    x, weight = rows(1.0, -2.0, 3.0), vector(2.0)
    pooled, total = reference.pooled_gate(x, weight, prefix=True)
    assert_same(pooled, rows(2.0, 1.0, 8.0 / 3.0))
    assert_same(total, torch.tensor([[8.0]]).double())
    carried = torch.tensor([[4.0]], dtype=torch.float64)
    pooled, total = reference.pooled_gate(x, weight, prefix=True, pooled_sum=carried, num_pooled=2)
    assert_same(pooled, rows(6.0 / 3.0, 6.0 / 4.0, 12.0 / 5.0))
    assert_same(total, torch.tensor([[12.0]]).double())


def test_paper_memory_by_hand():
    """D = 1, one token at slot 1 of 2, all scores 0: it reads the mean of the values."""
    weights = {"query": 0.0, "key": 1.0, "value": 2.0}
    weights |= {"output_gate": 1.0, "input_gate": 1.0, "forget_gate": -1.0}
    parameters = {
        f"{name}_proj.weight": torch.tensor([[value]]).double() for name, value in weights.items()
    }
    x, memory = rows(0.5), rows(3.0, -1.0)
    output, new_memory = reference.paper_memory(x, memory, parameters, num_heads=1, slot_offset=1)
    read = 2.0

    def sigmoid(value):
        return 1.0 / (1.0 + math.exp(-value))

    assert_same(output, rows(0.5 + sigmoid(read) * read))
    assert_same(new_memory, rows(3.0, sigmoid(0.5) * math.tanh(read) + sigmoid(-read) * -1.0))


def test_paper_memory_of_a_chunk_by_hand():
    """Both tokens write slot 1, and each with a term of its own in what it writes."""
    weights = {"query": 0.0, "key": 1.0, "value": 2.0, "candidate": -1.0}
    weights |= {"output_gate": 1.0, "input_gate": 1.0, "forget_gate": -1.0}
    parameters = {
        f"{name}_proj.weight": torch.tensor([[value]]).double() for name, value in weights.items()
    }
    x, memory = rows(0.5, -0.5), rows(3.0, -1.0)
    output, new_memory = reference.paper_memory(
        x, memory, parameters, num_heads=1, slot_offset=1, causal=False, tokens_per_slot=2
    )

    def sigmoid(value):
        return 1.0 / (1.0 + math.exp(-value))

    # both read the mean of the values, 2: the candidates are 2 - 1/2 and 2 + 1/2
    proposals = [
        sigmoid(0.5) * math.tanh(1.5) - sigmoid(-2.0),
        sigmoid(-0.5) * math.tanh(2.5) - sigmoid(-2.0),
    ]
    assert_same(output, rows(0.5 + sigmoid(2.0) * 2.0, -0.5 + sigmoid(2.0) * 2.0))
    assert_same(new_memory, rows(3.0, sum(proposals) / 2))


def _release_parameters() -> dict[str, torch.Tensor]:
    """D = 1: a LayerNorm of one element gives its bias, so the candidate is 1/2."""
    one, zero = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    squares = ("query_proj", "key_proj", "value_proj", "attention_mlp.0")
    return {f"{name}.weight": one for name in squares} | {
        "attended_memory_layernorm.weight": vector(1.0),
        "attended_memory_layernorm.bias": vector(3.0),
        "attended_memory_layernorm2.weight": vector(1.0),
        "attended_memory_layernorm2.bias": vector(0.5),
        "input_gate_projector.w": vector(1.0),
        "input_gate_projector.linear.weight": torch.cat((one / 2, zero)),
        "input_gate_projector.linear.bias": vector(0.0, 0.0),
        "memory_gate_projector.linear.weight": torch.cat((zero, zero)),
        "memory_gate_projector.linear.bias": vector(0.0, 0.0),
        "input_bias": torch.tensor(-1.0).double(),
        "forget_bias": torch.tensor(LN3, dtype=torch.float64),
    }


def test_release_memory_by_hand():
    parameters = _release_parameters()
    # the mean of relu(x) is 2, so the input gate is 2/2 - 1 = 0 and the forget gate ln 3
    x, memory = rows(4.0, -1.0), rows(4.0, 8.0)
    output, new_memory, total = reference.release_memory(x, memory, parameters, num_heads=1)
    written = 0.5 * math.tanh(0.5)
    assert_same(new_memory, rows(written + 3.0, written + 6.0))
    assert_same(output, rows(written + 7.0, written + 5.0))
    assert_same(total, torch.tensor([[4.0]]).double())
    # the prefix means are 4 and 2: the first token's input gate is sigmoid(1)
    _, prefixed, _ = reference.release_memory(x, memory, parameters, num_heads=1, prefix=True)
    first = math.tanh(0.5) / (1.0 + math.exp(-1.0)) + 3.0
    assert_same(prefixed, rows(first, written + 6.0))


def test_release_memory_of_a_chunk_by_hand():
    """Three tokens, two to a slot: each shows its own proposal, and the second slot has one."""
    parameters = _release_parameters() | {
        "candidate_proj.weight": torch.tensor([[0.25]]).double(),
        "candidate_proj.bias": vector(0.0),
    }
    # the mean of relu(x) is 2 again; the candidates are 1/2 + x / 4
    x, memory = rows(4.0, -1.0, 2.0), rows(4.0, 8.0)
    output, new_memory, total = reference.release_memory(
        x, memory, parameters, num_heads=1, causal=False, tokens_per_slot=2
    )
    first, second, third = (0.5 * math.tanh(value) for value in (1.5, 0.25, 1.0))
    assert_same(new_memory, rows((first + second) / 2 + 3.0, third + 6.0))
    assert_same(output, rows(4.0 + first + 3.0, -1.0 + second + 3.0, 2.0 + third + 6.0))
    assert_same(total, torch.tensor([[6.0]]).double())


# --- golden tensors ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", golden.FILES, ids=lambda path: path.stem)
def test_golden_forward_and_gradients(path):
    case = golden.load(path)
    parameters = {name: weight.requires_grad_() for name, weight in case.weights.items()}
    inputs = {name: tensor.requires_grad_() for name, tensor in case.inputs.items()}
    options = {
        "num_heads": case.num_heads,
        "slot_offset": case.slot_offset,
        "slot_mask": case.slot_mask,
        "top_k": case.top_k,
    }
    if case.formulation == "paper":
        options["output"] = case.output
        outputs = reference.paper_memory(inputs["x"], inputs["memory"], parameters, **options)
    else:
        options["num_blocks"] = case.num_blocks
        outputs = reference.release_memory(inputs["x"], inputs["memory"], parameters, **options)
    assert_round_off(outputs[0], case.outputs[0], "y")
    assert_round_off(outputs[1], case.outputs[1], "memory")
    leaves = parameters | inputs
    names = list(case.gradients)
    gradients = torch.autograd.grad(outputs[:2], [leaves[name] for name in names], case.cotangents)
    for name, gradient in zip(names, gradients, strict=True):
        assert_round_off(gradient, case.gradients[name], f"d{name}")


def test_golden_files_cover_both_layers():
    cases = [golden.load(path) for path in golden.FILES]
    assert {case.formulation for case in cases} == {"paper", "release"}
    assert any(case.slot_mask is not None for case in cases)
    assert any(case.top_k is not None for case in cases)
    assert any(case.num_blocks > 1 for case in cases)


# --- PyTorch's attention ----------------------------------------------------------------------


@pytest.mark.parametrize("tokens, slots, offset", [(1, 1, 0), (5, 5, 0), (4, 7, 2), (3, 9, 6)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_memory_attention_is_scaled_dot_product_attention(
    tokens, slots, offset, causal, masked, scale
):
    """Values and gradients, rows that see no slot included."""
    generator = torch.Generator().manual_seed(0)

    def draw(length):
        return torch.randn(2, length, 3, 8, generator=generator, dtype=torch.float64)

    tensors = [draw(tokens), draw(slots), draw(slots)]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    slot_mask = torch.rand(2, slots, generator=generator) < 0.5 if masked else None
    if masked:
        slot_mask[0, 0] = False
    options = {"causal": causal, "slot_offset": offset, "slot_mask": slot_mask}
    visible = reference.visible_slots(tokens, slots, **options)
    ours = reference.memory_attention(*leaves, scale=scale, **options)
    theirs = F.scaled_dot_product_attention(
        *(leaf.transpose(1, 2) for leaf in leaves), attn_mask=visible, scale=scale
    ).transpose(1, 2)
    assert_same(ours.detach(), theirs.detach())
    cotangent = draw(tokens)
    # side by side, as a row with one slot passes no gradient but rounding errors
    gradients = [
        torch.cat([grad.flatten() for grad in torch.autograd.grad(result, leaves, cotangent)])
        for result in (ours, theirs)
    ]
    assert_same(*gradients)


def test_residual_layer_norm_is_layer_norm():
    generator = torch.Generator().manual_seed(0)
    x, residual, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 5), (2, 3, 5), (5,), (5,))
    )
    result = reference.residual_layer_norm(x, residual, weight, bias)
    assert_same(result, F.layer_norm(x + residual, (5,), weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_dtype_of_their_input(dtype):
    for case in testing.SMALL_CASES:
        inputs = testing.make_inputs(case, dtype)
        results = testing.run_reference(case, inputs)
        for name, tensor in inputs.tensors.items():
            assert results[f"d{name}"].dtype == tensor.dtype, (case.id, name)
        for index, cotangent in enumerate(inputs.cotangents):
            assert results[f"output {index}"].dtype == cotangent.dtype, (case.id, index)


# --- slots that query tokens --------------------------------------------------------------------


def _querying(num_tokens: int, num_slots: int, locality: float) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x, memory = torch.randn(2, num_tokens, 6).double(), torch.randn(2, num_slots, 6).double()
    names = ("query", "key", "value", "output_gate", "input_gate", "forget_gate", "candidate")
    names += ("slot_query", "token_key")
    parameters = {f"{name}_proj.weight": torch.randn(6, 6).double() for name in names}
    parameters["slot_embedding"] = torch.randn(num_slots, 6).double()
    parameters["locality"] = torch.full((2,), locality, dtype=torch.float64)
    return x, memory, parameters


@pytest.mark.parametrize("pool", ("proposals", "gates"))
def test_slots_that_query_their_own_place_are_positions(pool):
    x, memory, parameters = _querying(5, 5, locality=1e5)
    got = reference.slot_query_memory(x, memory, parameters, num_heads=2, pool=pool)
    want = reference.paper_memory(x, memory, parameters, num_heads=2, causal=False)
    for one, other in zip(got, want, strict=True):
        assert_round_off(one, other)


def test_a_slot_that_queries_all_is_one_chunk():
    x, memory, parameters = _querying(5, 1, locality=-1e5)
    parameters["slot_query_proj.weight"].zero_()
    got = reference.slot_query_memory(x, memory, parameters, num_heads=2)
    want = reference.paper_memory(
        x, memory, parameters, num_heads=2, causal=False, tokens_per_slot=5
    )
    for one, other in zip(got, want, strict=True):
        assert_round_off(one, other)


def test_slots_prefer_tokens_nearby_by_hand():
    # softplus(ln(e - 1)) = 1: a token loses a factor of e by each c = 2 places from the centre,
    # which is at 1/2 and at 5/2
    x, memory, parameters = _querying(4, 2, locality=math.log(math.e - 1.0))
    memory = torch.zeros_like(memory)
    for name in ("slot_query", "input_gate"):
        parameters[f"{name}_proj.weight"].zero_()
    distance = torch.tensor([[0.5, 0.5, 1.5, 2.5], [2.5, 1.5, 0.5, 0.5]]).double()
    weights = torch.exp(-distance / 2.0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    # of an empty memory nothing is read
    written = 0.5 * torch.tanh(x @ parameters["candidate_proj.weight"].T)
    _, new = reference.slot_query_memory(x, memory, parameters, num_heads=2)
    assert_round_off(new, weights @ written)


@pytest.mark.parametrize("pool", ("proposals", "gates"))
def test_a_slot_finds_the_token_that_answers_its_query(pool):
    x, memory, parameters = _querying(4, 2, locality=-1e5)
    # slot n asks for what token 3 - n is, in both heads
    memory, parameters["slot_embedding"] = torch.zeros_like(memory), torch.zeros(2, 6).double()
    parameters["slot_embedding"][0, (0, 3)] = 1e4
    parameters["slot_embedding"][1, (1, 4)] = 1e4
    x[:, :, (0, 1, 3, 4)] = 0.0
    x[:, 3, (0, 3)] = 1.0
    x[:, 2, (1, 4)] = 1.0
    for name in ("slot_query_proj.weight", "token_key_proj.weight"):
        parameters[name] = torch.eye(6).double()
    parameters["token_key_proj.weight"][2, 2] = parameters["token_key_proj.weight"][5, 5] = 0.0
    _, new = reference.slot_query_memory(x, memory, parameters, num_heads=2, pool=pool)
    _, own = reference.paper_memory(
        x[:, (3, 2)], memory, parameters, num_heads=2, causal=False, tokens_per_slot=1
    )
    assert_round_off(new, own)
