"""``add_memory``: a memory layer behind the self-attention of a host's blocks, and back."""

import dataclasses
import inspect
import re
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lm2_kernels.checks import check_bool, check_int
from lm2_kernels.layers.base import check_write, default_causal, ordinary_parameter
from lm2_kernels.layers.paper import PaperMemory
from lm2_kernels.layers.release import ReleaseMemory
from lm2_kernels.layers.start import check_segments, check_start, silence, tokens_bound
from lm2_kernels.patching.adapters import is_adapter, refuse_adapters
from lm2_kernels.patching.follow import MEMORY, AddedMemory
from lm2_kernels.patching.hosts import Host, find_blocks
from lm2_kernels.patching.report import Report, module_names, report_on
from lm2_kernels.patching.swap import SwappedMemory, replace_modules, share_parameters
from lm2_kernels.state import files
from lm2_kernels.state.hub import Place

# the attribute of a host's config that save_pretrained writes for load_memory
OPTIONS = "lm2_memory"
_MEMORY_KEY = r"(\d+)\.memory\.(.+)$"


class _Replaced:
    """A method of one model, in the place of its class's. It does not keep the model alive."""

    def __init__(self, function: Callable, model: nn.Module):
        self._function, self._model = function, weakref.ref(model)

    def __call__(self, *args, **kwargs):
        return self._function(self._model(), *args, **kwargs)

    def __getstate__(self):
        return self._function, self._model()

    def __setstate__(self, state):
        self.__init__(*state)


def _call_uncompiled(model: nn.Module, *_: object) -> Callable:
    """What ``generate`` is given when it asks for a compiled model.

    A step reads the memory at its place in the segment: each would be a graph of its own.
    """
    return model.__call__


def _refuse_batching(model: nn.Module, *_: object, **__: object) -> None:
    raise NotImplementedError(
        "add_memory: continuous batching (generate_batch) holds many sequences in the pages of one "
        "cache, which the memory cannot follow; use generate, with padded prompts as a batch"
    )


# methods of transformers' models; later on, what a generation raises in its thread is not shown
_REPLACED = {
    "get_compiled_call": _call_uncompiled,
    "init_continuous_batching": _refuse_batching,
    "generate_batch": _refuse_batching,
}


class _AddedRelease(ReleaseMemory):
    def __init__(self, dim: int, num_heads: int, **options):
        super().__init__(dim, num_heads, pooled_gate="prefix", **options)
        # transformers saves no tensor that has two names
        self.attention_mlp.under_all_names = False


def add_memory(
    model: nn.Module,
    *,
    memory_slots: int = 2048,
    segment_length: int | None = None,
    num_heads: int = 8,
    layers: Sequence[int] | None = None,
    formulation: str = "paper",
    write: str = "position",
    memory_causal: bool | None = None,
    candidate: str = "token",
    memory_init: str | None = None,
    zero_init: bool = True,
    freeze: bool = True,
    dropout: float = 0.0,
    backend: str | None = None,
    host: Host | None = None,
) -> Report:
    """Give a decoder of ``transformers`` a memory, in place.

    A memory layer acts on a block's self-attention output, before that is added to the residual
    stream, and is the block's submodule ``memory``: ``state_dict``, ``to`` and optimisers see it.
    The blocks are found by their structure, whatever the model's class: by that of Llama, which
    most have, of GPT-2, GPT-NeoX, Falcon, Phi or OPT (``lm2_kernels.patching.HOSTS``). Each block
    has a bank of its own, carried from segment to segment of ``segment_length`` tokens
    (``flow="time"``; ``"depth"`` is impossible, as the host runs all tokens through a block before
    the next one). The host's own attention is unchanged. Padding, wherever ``attention_mask`` has
    it, is neither read nor written.

    The state follows the key/value cache, through ``generate`` and beam search too; see
    :class:`AddedMemory`, which the report has as ``memory``. After ``save_pretrained``, load the
    model without memory and call :func:`load_memory`. Adapters of PEFT come after the memory, with
    ``modules_to_save=["memory"]`` in their config.

    Args:
        model: any module that holds one list of decoder blocks.
        memory_slots: slots N of each bank.
        segment_length: tokens S of a segment; ``memory_slots`` unless given.
        num_heads: heads of the memory attention; must divide the model's width.
        layers: which blocks; None is all that have a self-attention.
        formulation: "paper" (:class:`PaperMemory`) or "release" (:class:`ReleaseMemory` with
            ``pooled_gate="prefix"``).
        write: "position": each token of a segment rewrites a slot of its own, so that
            ``segment_length`` is at most ``memory_slots``. "chunk": each slot is rewritten by S / N
            neighbouring tokens, a whole number.
        memory_causal: whether a token sees the slots up to its own alone; None is True for
            "position" and False for "chunk", which refuses True.
        candidate: what is written: "token" has a term of the token; "read" is LM2's own, which
            learns later (docs/study.md).
        memory_init: what a bank starts from, "identity" or "zeros" (release formulation alone, and
            there the default with ``zero_init``).
        zero_init: initialise the layers so that the model computes bit for bit what it computed
            before. The release formulation then learns one bias first, and the rest from sequences
            of several segments.
        freeze: require gradients of the memory layers alone. Gradient checkpointing then needs
            ``use_reentrant=False``, or transformers' ``enable_input_require_grads``.
        dropout: on the memory attention's probabilities, while training.
        backend: of the memory layers; None takes the default (``use_backend``).
        host: what the model's blocks look like, if no family of ``HOSTS`` does.

    Returns:
        What was added, with parameter groups for an optimiser.

    Raises:
        TypeError, ValueError: nothing matches, there is a memory already or an adapter of PEFT, or
            an option does not fit; the model is unchanged.
    """
    if any(hasattr(module, MEMORY) for module in model.modules()):
        raise ValueError("add_memory: the model has a memory already; see remove_memory")
    refuse_adapters(model)
    check_int("add_memory", "memory_slots", memory_slots, 1)
    if segment_length is None:
        segment_length = memory_slots
    check_int("add_memory", "segment_length", segment_length, 1)
    causal = default_causal(write) if memory_causal is None else memory_causal
    check_bool("add_memory", "memory_causal", causal)
    check_segments("add_memory", memory_slots, segment_length, write)
    tokens_per_slot = tokens_bound(memory_slots, segment_length, write)
    check_write("add_memory", write, tokens_per_slot, causal, candidate)
    check_bool("add_memory", "zero_init", zero_init)
    check_bool("add_memory", "freeze", freeze)
    if memory_init is None:
        memory_init = "zeros" if zero_init and formulation == "release" else "identity"
    check_start("add_memory", formulation, memory_init, zero_init, ("identity", "zeros"))
    host, list_name, decoder, blocks = find_blocks(model, None if host is None else (host,))
    attending = [index for index, block in enumerate(blocks) if host.is_block(block)]
    layers = attending if layers is None else list(layers)
    for index in layers:
        check_int("add_memory", "layers", index, 0)
        if index not in attending:
            raise ValueError(
                f"add_memory: layers has {index}, but {list_name} has {len(blocks)} blocks, and "
                f"with a self-attention: {attending}"
            )
        if hasattr(blocks[index], "memory"):
            raise ValueError(f"add_memory: {list_name}.{index} has an attribute 'memory' already")
    if (
        not layers
        or layers != sorted(set(layers))
        or len({blocks[i] for i in layers}) < len(layers)
    ):
        raise ValueError(f"add_memory: layers must ascend, without repeats, got {layers}")

    new = []
    for index in layers:
        block = blocks[index]
        like = ordinary_parameter(block)
        kind = PaperMemory if formulation == "paper" else _AddedRelease
        layer = kind(
            host.width(block),
            num_heads,
            causal=memory_causal,
            dropout=dropout,
            write=write,
            tokens_per_slot=tokens_per_slot,
            candidate=candidate,
            backend=backend,
            device=_device(block, like),
            dtype=like.dtype,
        )
        if zero_init:
            silence(layer)
        new.append(layer.train(block.training))

    options = {
        "memory_slots": memory_slots,
        "segment_length": segment_length,
        "num_heads": num_heads,
        "layers": layers,
        "formulation": formulation,
        "write": write,
        "memory_causal": memory_causal,
        "candidate": candidate,
        "memory_init": memory_init,
        "zero_init": zero_init,
        "dropout": dropout,
    }
    memory = AddedMemory(decoder, {index: blocks[index] for index in layers}, host, options)
    if freeze:
        memory.frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in memory.frozen:
        parameter.requires_grad_(False)
    for index, layer in zip(layers, new, strict=True):
        blocks[index].memory = layer
    setattr(decoder, MEMORY, memory)
    if hasattr(model, "config"):
        setattr(model.config, OPTIONS, options)
    for name, function in _REPLACED.items():
        if hasattr(model, name):
            setattr(model, name, _Replaced(function, model))
    return report_on("added", model, module_names(model, memory.layers), memory)


def _device(block: nn.Module, like: nn.Parameter) -> torch.device | str | int:
    """Where a block computes: offloaded weights are on the meta device until they are needed."""
    if like.is_meta:
        for module in block.modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return device
    return like.device


def get_memory(model: nn.Module) -> AddedMemory:
    """The memory that :func:`add_memory` gave a model; ValueError if there is none."""
    for module in model.modules():
        if hasattr(module, MEMORY):
            return getattr(module, MEMORY)
    raise ValueError(f"get_memory: {type(model).__name__} has no added memory; see add_memory")


def load_memory(
    model: nn.Module,
    folder: str | Path,
    *,
    freeze: bool = True,
    backend: str | None = None,
    host: Host | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Report:
    """Give a model the memory that a model had when ``save_pretrained`` wrote it to a folder.

    Where the host's weights are elsewhere (offloaded, on the meta device), those of the memory are
    on the CPU.

    Args:
        model: the host, as ``from_pretrained`` of the same folder makes it.
        folder: has ``config.json`` and ``model.safetensors``, or several files and their index
            ``model.safetensors.index.json``; other files in it do not matter. Or the name
            "user/model" of a repository of the Hugging Face Hub, if ``huggingface_hub`` is
            installed.
        freeze: as of :func:`add_memory`.
        backend: as of :func:`add_memory`.
        host: as of :func:`add_memory`.
        revision: of the repository.
        token: for a repository that is not public.
        cache_dir: where the repository's files are kept.

    Raises:
        OSError: there is no such file, or the Hub does not give it.
        ValueError: there is no memory in the folder, it does not fit, or weights are missing.
    """
    place = Place("load_memory", folder, revision=revision, token=token, cache_dir=cache_dir)
    config = place.path(files.CONFIG)
    if not config.is_file():
        if is_adapter(place):
            raise ValueError(
                f"load_memory: {folder} holds adapters of PEFT, and the memory with them: call "
                f"add_memory with the options that it had, then PeftModel.from_pretrained"
            )
        raise FileNotFoundError(f"load_memory: no such file: {config}")
    options = files.read_json(config).get(OPTIONS)
    if options is None:
        raise ValueError(f"load_memory: {config} has no '{OPTIONS}'")
    known = set(inspect.signature(add_memory).parameters) - {"model", "freeze", "backend", "host"}
    if not isinstance(options, dict) or not set(options) <= known:
        raise ValueError(f"load_memory: '{OPTIONS}' in {config} holds no options of add_memory")
    # what was saved before there was a choice
    options = {"candidate": "read"} | options
    saved = _saved_layers(place)
    report = add_memory(model, **options, freeze=freeze, backend=backend, host=host)
    try:
        for index, layer in zip(report.memory.options["layers"], report.memory.layers, strict=True):
            _load_layer(layer, saved.get(index, {}))
    except RuntimeError as error:
        remove_memory(model)
        raise ValueError(f"load_memory: block {index} in {folder} does not fit: {error}") from None
    return dataclasses.replace(report, action="loaded")


def _saved_layers(place: Place) -> dict[int, dict[str, Tensor]]:
    """The state dicts of the memory layers, by the numbers of their blocks."""
    saved: dict[int, dict[str, Tensor]] = {}
    for file, names in files.weight_files(place).items():
        for name, tensor in files.read_tensors(file, names, _MEMORY_KEY).items():
            index, key = re.search(_MEMORY_KEY, name).groups()
            own = saved.setdefault(int(index), {})
            if key in own:
                raise ValueError(f"load_memory: {file} has a second weight for {name!r}")
            own[key] = tensor
    return saved


def _load_layer(layer: nn.Module, saved: dict[str, Tensor]) -> None:
    """Load a layer; one without weights of its own, as a host's on the meta device, takes these."""
    own = layer.state_dict()
    is_meta = any(tensor.is_meta for tensor in own.values())
    if is_meta:
        saved = {n: t.to(own[n].dtype) if n in own else t for n, t in saved.items()}
    layer.load_state_dict(saved, assign=is_meta)


def remove_memory(model: nn.Module) -> Report:
    """Undo :func:`add_memory` and :func:`swap_memory`: the model is as it was before.

    Raises:
        ValueError: there is nothing to remove.
    """
    added = [module for module in model.modules() if hasattr(module, MEMORY)]
    layers = [layer for module in added for layer in getattr(module, MEMORY).layers]
    swapped = [module for module in model.modules() if isinstance(module, SwappedMemory)]
    if not layers and not swapped:
        raise ValueError(
            f"remove_memory: {type(model).__name__} has no memory of add_memory or swap_memory"
        )
    before = report_on("removed", model, module_names(model, [*layers, *swapped]))
    for module in added:
        getattr(module, MEMORY).remove()
        delattr(module, MEMORY)
    if added and hasattr(getattr(model, "config", None), OPTIONS):
        delattr(model.config, OPTIONS)
    for module in model.modules():
        for name in _REPLACED:
            if isinstance(module.__dict__.get(name), _Replaced):
                delattr(module, name)
    for module in swapped:
        # the same, unless something put others in their places
        share_parameters(module, module.released[0])
        module.released[0].train(module.training)
    replace_modules(model, {id(module): module.released[0] for module in swapped})
    after = report_on("removed", model, [])
    return dataclasses.replace(after, modules=before.modules, parameters=before.parameters)
