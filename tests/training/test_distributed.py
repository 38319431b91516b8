"""Two processes are one: DDP, FSDP of both kinds, parallel projections; saved and gone on with."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    StateDictType,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import lm2_kernels as lm2
from lm2_kernels import LM2ForCausalLM
from lm2_kernels.model.decoder import Block
from lm2_kernels.training import distributed, train
from tools.models import random_ids, small_model
from tools.processes import run_processes
from tools.rounding import assert_round_off

try:
    import transformers
except ImportError:
    transformers = None
else:
    transformers.logging.set_verbosity_error()

every_formulation = pytest.mark.parametrize("formulation", ("paper", "release"))

CPU = torch.device("cpu")
STEPS = 2


def _model(host: str, formulation: str, seed: int = 0) -> nn.Module:
    if host in ("lm2", "recomputed", "chunk"):
        options = {"flow": "chunk" if host == "chunk" else "time", "num_hidden_layers": 2}
        options["memory_recompute"] = host == "recomputed"
        return small_model(seed=seed, formulation=formulation, **options)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double()
    options = {"formulation": formulation, "freeze": host == "frozen", "zero_init": False}
    options |= {"memory_slots": 6, "num_heads": 3, "memory_init": "identity"}
    if host == "llama chunk":
        options |= {"memory_slots": 2, "segment_length": 6, "write": "chunk", "candidate": "token"}
    lm2.add_memory(model, **options)
    return model


def _block(model: nn.Module) -> type:
    return type(model.model.layers[0])


def _wrap(model: nn.Module, kind: str) -> nn.Module:
    blocks = list(model.model.layers)
    if kind in ("ddp", "fsdp"):
        return distributed.wrap(model, kind, CPU)
    if kind.startswith("fsdp1"):
        return FullyShardedDataParallel(
            model,
            use_orig_params=kind == "fsdp1",
            auto_wrap_policy=ModuleWrapPolicy({_block(model)}),
            device_id=CPU,
        )
    if kind == "checkpointed":
        apply_activation_checkpointing(
            model, check_fn=lambda module: isinstance(module, _block(model))
        )
    inner, options = blocks, {}
    if kind == "hybrid":
        options["mesh"] = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))
    elif kind == "every layer":
        inner = [block.memory for block in blocks] + blocks
    elif kind == "every Linear":
        inner = [module for module in model.modules() if isinstance(module, nn.Linear)]
    elif kind == "root":
        inner = []
    elif kind == "offloaded":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    else:
        assert kind == "checkpointed"
    for module in inner:
        fully_shard(module, **options)
    return fully_shard(model, **options)


def _batches(first: int, last: int) -> torch.Tensor:
    return torch.stack([random_ids(4, 14, seed) for seed in range(first, last)])


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # not one that divides by gradients, whose rounding would count where they are small
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=0.1, momentum=0.9)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: torch.Tensor) -> None:
    """Gradients flow from one call to another, through the memory."""
    carried = (
        None
        if isinstance(getattr(model, "module", model), LM2ForCausalLM)
        else (lm2.get_memory(model))
    )
    for ids in batches:
        optimizer.zero_grad()
        first, second = ids.split(7, dim=1)
        if carried is None:
            memory = model(first).memory
            loss = model(second, labels=second, memory=memory).loss
        else:
            carried.carry = True
            model(input_ids=first)
            loss = model(input_ids=second, labels=second).loss
            carried.reset()
        loss.backward()
        optimizer.step()
    if carried is not None:
        carried.carry = False


def _whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    if not isinstance(model, FullyShardedDataParallel):
        return distributed.full_state_dict(model)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _train_and_save(kind, host, formulation, folder):
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    model = _wrap(_model(host, formulation), kind)
    optimizer = _optimizer(model)
    _train(model, optimizer, _batches(0, STEPS)[:, half])
    distributed.save_progress(folder, model, optimizer, STEPS)
    _train(model, optimizer, _batches(STEPS, STEPS + 1)[:, half])
    return _whole_state(model)


def _uneven() -> list[dict[str, torch.Tensor]]:
    """Batches of which the processes have 1 + 6 and 3 + 2 labels."""
    found = []
    for ids in _batches(0, STEPS):
        labels = torch.full_like(ids, -100)
        for row, count in enumerate((1, 3, 6, 2)):
            labels[row, 14 - count :] = ids[row, 14 - count :]
        found.append({"input_ids": ids, "labels": labels})
    return found


def _fit(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    batches = distributed.weighted(batches, CPU)
    train(model, batches, steps=STEPS, lr=0.1, optimizer=_optimizer(model))
    return _whole_state(model)


def _fit_both():
    rows = slice(dist.get_rank(), None, 2)
    own = [{name: tensor[rows] for name, tensor in batch.items()} for batch in _uneven()]
    return [_fit(_wrap(_model("lm2", "release"), kind), own) for kind in ("ddp", "fsdp")]


def test_every_label_counts_as_much(tmp_path):
    """Also where one process has more of them than the other."""
    states, _ = run_processes(_fit_both, folder=tmp_path)
    for name, tensor in _fit(_model("lm2", "release"), _uneven()).items():
        for state in states:
            assert_round_off(state[name], tensor, name)


KINDS = ("ddp", "fsdp", "fsdp1", "fsdp1-flat", "hybrid", "every layer", "every Linear", "root",
         "offloaded", "checkpointed")  # fmt: skip
CASES = [
    *[("lm2", kind, "release") for kind in KINDS if kind != "every Linear"],
    *[("lm2", kind, "paper") for kind in ("ddp", "fsdp", "every Linear")],
    *[("llama", kind, "paper") for kind in ("fsdp1-flat", "checkpointed", "every layer")],
    *[("llama", kind, "release") for kind in ("fsdp", "fsdp1")],
    *[("recomputed", kind, "release") for kind in ("fsdp", "fsdp1")],
    *[("frozen", kind, "paper") for kind in ("ddp", "fsdp", "fsdp1", "checkpointed")],
    ("chunk", "ddp", "release"),
    *[("chunk", kind, "paper") for kind in ("fsdp", "fsdp1")],
    pytest.param("llama chunk", "every layer", "release", marks=pytest.mark.slow),
    pytest.param("llama chunk", "checkpointed", "paper", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("host", "kind", "formulation"), CASES)
def test_two_processes_are_one(host, kind, formulation, tmp_path):
    if host in ("llama", "llama chunk", "frozen") and transformers is None:
        pytest.skip("transformers is not installed")
    run = tmp_path / "run"
    state, _ = run_processes(_train_and_save, kind, host, formulation, run, folder=tmp_path)
    one = _model(host, formulation)
    optimizer = _optimizer(one)
    _train(one, optimizer, _batches(0, STEPS + 1))
    wanted = one.state_dict()
    assert set(state) == set(wanted)
    for name, tensor in wanted.items():
        assert_round_off(state[name], tensor, name)
    # one process goes on with what two saved
    again = _model(host, formulation, seed=1)
    optimizer = _optimizer(again)
    assert distributed.load_progress(run, again, optimizer) == STEPS
    _train(again, optimizer, _batches(STEPS, STEPS + 1))
    for name, tensor in wanted.items():
        assert_round_off(again.state_dict()[name], tensor, name)
    ids = random_ids(2, 20, 9)
    with torch.no_grad():
        assert_round_off(again(ids).logits, one(ids).logits)


def _mixed(kind, formulation):
    model = _model("lm2", formulation).float()
    low = torch.bfloat16
    if kind == "fsdp1":
        model = FullyShardedDataParallel(
            model,
            use_orig_params=True,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            mixed_precision=MixedPrecision(param_dtype=low, reduce_dtype=torch.float32),
            device_id=CPU,
        )
    else:
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        for block in model.model.layers:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    ids = random_ids(2, 14)
    output = model(ids, labels=ids, return_logits=True)
    output.loss.backward()
    kinds = {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None}
    assert kinds == {torch.float32}
    return output.logits.detach()


@every_formulation
@pytest.mark.parametrize("kind", ("fsdp", "fsdp1"))
def test_mixed_precision_computes_in_16_bits(kind, formulation, tmp_path):
    for logits in run_processes(_mixed, kind, formulation, folder=tmp_path):
        model = _model("lm2", formulation).bfloat16()
        assert torch.equal(logits, model(random_ids(2, 14)).logits)


def _parallel(formulation, styles):
    torch.manual_seed(0)
    kind = lm2.PaperMemory if formulation == "paper" else lm2.ReleaseMemory
    layer = kind(8, 2, dtype=torch.float64)
    x, memory = torch.randn(2, 2, 4, 8, dtype=torch.float64).unbind(0)
    x.requires_grad_()
    plan = {}
    for name, style in zip(("query_proj", "key_proj", "value_proj"), styles, strict=True):
        make = {
            "columns": functools.partial(ColwiseParallel, output_layouts=Replicate()),
            "rows": functools.partial(RowwiseParallel, input_layouts=Replicate()),
        }[style]
        plan[name] = make()
    wanted = layer(x, memory)
    (wanted[0].sum() + wanted[1].square().sum()).backward()
    dx, x.grad = x.grad, None
    weight = layer.key_proj.weight.grad
    layer.zero_grad()
    parallelize_module(layer, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    got = layer(x, memory)
    (got[0].sum() + got[1].square().sum()).backward()
    for mine, other in ((got[0], wanted[0]), (got[1], wanted[1]), (x.grad, dx)):
        assert_round_off(mine.detach(), other.detach())
    assert_round_off(layer.key_proj.weight.grad.full_tensor(), weight)


@every_formulation
def test_parallel_projections(formulation, tmp_path):
    run_processes(_parallel, formulation, ("columns", "rows", "columns"), folder=tmp_path)


def _columns_apart():
    layer = lm2.PaperMemory(8, 2)
    parallelize_module(
        layer, init_device_mesh("cpu", (dist.get_world_size(),)), {"query_proj": ColwiseParallel()}
    )
    with pytest.raises(ValueError, match=r"query_proj.*\(2, 4, 8\)"):
        layer(torch.randn(2, 4, 8), torch.randn(2, 4, 8))


def test_columns_left_apart_are_refused(tmp_path):
    run_processes(_columns_apart, folder=tmp_path)


def _load_whole(state, formulation):
    with torch.device("meta"):
        model = _model("lm2", formulation)
    for module in [*model.model.layers, model]:
        fully_shard(module)
    model.to_empty(device="cpu")
    # torch hands out the first of the shared Linear's names alone
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, state if dist.get_rank() == 0 else {}, options=options)
    return model(random_ids(2, 14)).logits.detach()


@every_formulation
def test_whole_weights_load_into_shards(formulation, tmp_path):
    model = _model("lm2", formulation)
    for logits in run_processes(_load_whole, model.state_dict(), formulation, folder=tmp_path):
        assert_round_off(logits, model(random_ids(2, 14)).logits.detach())


def _generate(formulation):
    model = _wrap(_model("lm2", formulation), "fsdp")
    register_fsdp_forward_method(model, "generate")
    return model.generate(random_ids(2, 8), max_new_tokens=5).sequences


@every_formulation
def test_shards_generate(formulation, tmp_path):
    wanted = _model("lm2", formulation).generate(random_ids(2, 8), max_new_tokens=5).sequences
    for sequences in run_processes(_generate, formulation, folder=tmp_path):
        assert torch.equal(sequences, wanted)
