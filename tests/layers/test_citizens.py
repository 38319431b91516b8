"""What is done to any nn.Module is done to the layers: as it would be to plain PyTorch."""

import copy
import importlib.util
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lm2_kernels as lm2
from lm2_kernels import reference
from tools.processes import run_processes
from tools.rounding import assert_round_off

D, H, T, N = 12, 3, 4, 6
KINDS = {"paper": lm2.PaperMemory, "release": lm2.ReleaseMemory}
every_kind = pytest.mark.parametrize("kind", KINDS)


def _layer(kind, seed=0, **options):
    torch.manual_seed(seed)
    return KINDS[kind](D, H, dtype=torch.float64, **options)


def _inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, T, D, generator=generator, dtype=torch.float64),
        torch.randn(2, N, D, generator=generator, dtype=torch.float64),
    )


class _Plain(nn.Module):
    """A layer computed by the oracle, with the layer's parameters."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        kind = isinstance(layer, lm2.PaperMemory)
        self.function = reference.paper_memory if kind else reference.release_memory

    def forward(self, x, memory):
        parameters = dict(self.layer.named_parameters(remove_duplicate=False))
        return self.function(x, memory, parameters, num_heads=H)[:2]


def _loss(model, seed=0):
    return sum(result.square().mean() for result in model(*_inputs(seed)))


def _assert_same(layer, other):
    for (name, mine), theirs in zip(layer.named_parameters(), other.parameters(), strict=True):
        assert_round_off(mine.detach(), theirs.detach(), name)


OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "AdamW": {"lr": 0.01, "amsgrad": True},
    "Adagrad": {"lr": 0.1},
    "RMSprop": {"lr": 0.01, "centered": True, "eps": 1e-3},
    "NAdam": {"lr": 0.01},
    "LBFGS": {"lr": 0.1, "max_iter": 3},
}


@every_kind
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers(name, kind):
    layer = _layer(kind)
    plain = _Plain(copy.deepcopy(layer))
    for model in (layer, plain):
        optimizer = getattr(torch.optim, name)(model.parameters(), **OPTIMIZERS[name])
        for step in range(4):

            def closure(optimizer=optimizer, model=model, step=step):
                optimizer.zero_grad()
                loss = _loss(model, step)
                loss.backward()
                return loss

            optimizer.step(closure)
            if step == 1:
                saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
                optimizer = getattr(torch.optim, name)(model.parameters(), **OPTIMIZERS[name])
                optimizer.load_state_dict(saved)
    # what an optimiser divides by may be as small as its epsilon
    for mine, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@every_kind
@pytest.mark.parametrize("use_buffers", (True, False))
def test_averaged_weights(kind, use_buffers):
    layer = _layer(kind)
    average = torch.optim.swa_utils.AveragedModel(
        layer,
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5),
        use_buffers=use_buffers,
    )
    wanted = [parameter.detach().clone() for parameter in layer.parameters()]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        _loss(layer, step).backward()
        optimizer.step()
        average.update_parameters(layer)
        if step == 0:
            # the first are taken as they are
            wanted = [parameter.detach().clone() for parameter in layer.parameters()]
        else:
            wanted = [
                0.5 * old + 0.5 * new for old, new in zip(wanted, layer.parameters(), strict=True)
            ]
    for mine, theirs in zip(average.module.parameters(), wanted, strict=True):
        assert_round_off(mine.detach(), theirs.detach())
    twin = _layer(kind, seed=1)
    twin.load_state_dict(average.module.state_dict())
    assert torch.equal(average(*_inputs())[0], twin(*_inputs())[0])


@every_kind
def test_weights_tied_within_and_between_layers(kind):
    def tie(one, two):
        two.query_proj.weight = one.query_proj.weight
        two.value_proj = one.value_proj
        one.key_proj.weight = one.query_proj.weight
        return nn.ModuleList([one, two])

    layers = tie(_layer(kind), _layer(kind, seed=1))
    x, memory = _inputs()

    def run(layers):
        first, rows = layers[0](x, memory)
        second, rows = layers[1](first, rows)
        (second.square().mean() + rows.square().mean()).backward()
        return [parameter.grad for parameter in layers.parameters()]

    moved = copy.deepcopy(layers).float().double()
    assert moved[1].value_proj.weight is moved[0].value_proj.weight
    assert moved[0].key_proj.weight is moved[1].query_proj.weight
    plain = copy.deepcopy(layers)
    for mine, theirs in zip(run(layers), run(nn.ModuleList(map(_Plain, plain))), strict=True):
        assert_round_off(mine, theirs)


@every_kind
@pytest.mark.parametrize("swap", (True, False))
def test_conversions_that_swap_tensors(kind, swap):
    layer = _layer(kind)
    before = [id(parameter) for parameter in layer.parameters()]
    # no graph may hold what is swapped
    wanted = layer(*_inputs())[0].detach()
    old = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        layer.to(torch.float32).to(torch.float64)
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(old)
    assert [id(parameter) for parameter in layer.parameters()] == before
    torch.testing.assert_close(layer(*_inputs())[0], wanted, rtol=1e-5, atol=1e-5)
    _loss(layer).backward()


WAYS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@every_kind
@pytest.mark.parametrize("way", WAYS)
def test_parametrisations_of_every_projection(way, kind):
    layer = _layer(kind).eval()
    for module in [m for m in layer.modules() if isinstance(m, nn.Linear)]:
        WAYS[way](module, "weight")
    values = {
        f"{name}.{leaf}".lstrip("."): getattr(module, leaf)
        for name, module in layer.named_modules()
        for leaf in ("weight", "bias", "w", "input_bias", "forget_bias")
        if isinstance(getattr(module, leaf, None), torch.Tensor)
    }
    function = reference.paper_memory if kind == "paper" else reference.release_memory
    wanted = function(*_inputs(), values, num_heads=H)
    for mine, theirs in zip(layer(*_inputs()), wanted, strict=False):
        assert_round_off(mine.detach(), theirs.detach())
    _loss(layer).backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    trained = torch.optim.SGD(layer.parameters(), lr=0.1)
    trained.step()
    for module in [m for m in layer.modules() if isinstance(m, nn.Linear)]:
        torch.nn.utils.parametrize.remove_parametrizations(module, "weight")
    _loss(layer).backward()


@pytest.mark.filterwarnings("ignore:.*is not used on meta")
@every_kind
def test_default_dtype_and_device(kind):
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            layer = KINDS[kind](D, H)
            memory = lm2.initial_memory(2, N, D)
        assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(torch.float64, "meta")}
        assert (memory.dtype, memory.device.type) == (torch.float64, "meta")
        output, new = layer(torch.randn(2, T, D, device="meta"), memory)
        assert output.is_meta
        assert new.shape == (2, N, D)
        layer = KINDS[kind](D, H)
        assert_round_off(layer(*_inputs())[0].detach(), _Plain(layer)(*_inputs())[0].detach())
    finally:
        torch.set_default_dtype(old)


@every_kind
def test_deterministic_mode_and_saved_tensor_hooks(kind):
    wanted = torch.autograd.grad(_loss(layer := _layer(kind)), list(layer.parameters()))
    old = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.graph.save_on_cpu():
            got = torch.autograd.grad(_loss(layer), list(layer.parameters()))
    finally:
        torch.use_deterministic_algorithms(old)
    assert all(map(torch.equal, got, wanted))


@every_kind
def test_dynamic_export(kind):
    """Whole segments of any batch and length."""
    layer = _layer(kind)
    batch, tokens = torch.export.Dim("batch", min=2), torch.export.Dim("tokens", min=2)
    shapes = ({0: batch, 1: tokens},) * 2
    example = torch.randn(2, 2, N, D, dtype=torch.float64).unbind(0)
    program = torch.export.export(layer, example, dynamic_shapes=shapes).module()
    for size, length in ((2, T), (3, 2), (5, N)):
        x, memory = torch.randn(2, size, length, D, dtype=torch.float64).unbind(0)
        for mine, theirs in zip(program(x, memory), layer(x, memory), strict=True):
            assert_round_off(mine.detach(), theirs.detach())


def _loss_of(layer):
    loss = _loss(layer)
    loss.backward()
    return loss.item(), [parameter.grad.sum().item() for parameter in layer.parameters()]


@every_kind
def test_in_a_forked_process(kind, tmp_path):
    layer = _layer(kind)
    wanted = _loss_of(copy.deepcopy(layer))
    assert run_processes(_loss_of, layer, folder=tmp_path) == [wanted] * 2


def _train_a_little(layers):
    for layer in layers:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        _loss(layer).backward()
        optimizer.step()


def _train_in_a_process(layers):
    # a forked process has none of the threads that torch may have started
    torch.set_num_threads(1)
    _train_a_little(layers)


@pytest.mark.parametrize("method", ("fork", "spawn"))
def test_parameters_in_shared_memory(method):
    """They stay there, and one process sees what another trains."""
    layers = nn.ModuleList(map(_layer, KINDS))
    alone = copy.deepcopy(layers)
    for layer in layers.share_memory():
        layer.double()
        assert all(parameter.is_shared() for parameter in layer.parameters())
    process = torch.multiprocessing.get_context(method).Process(
        target=_train_in_a_process, args=(layers,)
    )
    process.start()
    _train_a_little(alone)
    process.join(120)
    assert process.exitcode == 0
    for layer, other in zip(layers, alone, strict=True):
        assert all(parameter.is_shared() for parameter in layer.parameters())
        _assert_same(layer, other)


@every_kind
def test_a_saved_layer_is_loaded(kind, tmp_path):
    layer = _layer(kind)
    torch.save(layer, tmp_path / "whole.pt")
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    other = _layer(kind, seed=1)
    other.load_state_dict(torch.load(tmp_path / "state.pt", mmap=True, weights_only=True))
    for each in (whole, other):
        assert torch.equal(each(*_inputs())[0], layer(*_inputs())[0])
        _loss(each).backward()


def _reason(name):
    return f"{name} is not installed" if importlib.util.find_spec(name) is None else None


@every_kind
@pytest.mark.skipif(_reason("torchao") is not None, reason=str(_reason("torchao")))
def test_weights_of_8_bits(kind):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = _layer(kind).float()
    x, memory = (tensor.float() for tensor in _inputs())
    wanted = layer(x, memory)[0]
    quantize_(layer, Int8WeightOnlyConfig())
    error = (layer(x, memory)[0] - wanted).abs().max()
    assert 0.0 < error < 0.1


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@every_kind
@pytest.mark.skipif(_reason("bitsandbytes") is not None, reason=str(_reason("bitsandbytes")))
def test_projections_of_8_bits(kind):
    from bitsandbytes.nn import Linear8bitLt

    layer = _layer(kind).float()
    x, memory = (tensor.float() for tensor in _inputs())
    wanted = layer(x, memory)[0]
    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                sizes = child.in_features, child.out_features
                new = Linear8bitLt(*sizes, child.bias is not None, has_fp16_weights=False)
                new.load_state_dict(child.state_dict())
                setattr(module, name, new)
    error = (layer.to("cpu")(x, memory)[0] - wanted).abs().max()
    assert 0.0 < error < 0.1


@every_kind
@pytest.mark.skipif(_reason("lightning") is not None, reason=str(_reason("lightning")))
def test_lightning_trains(kind, tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = _layer(kind)

        def training_step(self, batch, index):
            return _loss(self.layer, index)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    module = Module()
    before = _loss(module.layer).item()
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=5, default_root_dir=tmp_path, **options)
    trainer.fit(module, torch.utils.data.DataLoader(range(2)))
    assert _loss(module.layer).item() < before
    again = Module.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    _assert_same(again.layer, module.layer)
