"""What users could pick instead of this package's layers: the benchmarks' other rows.

Written from the mathematics, with the parameters and state dicts of the package's own layers.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lm2_kernels import reference


class ReleasedStyleMemory(nn.Module):
    """The released memory layer, computed the way the released code does.

    Separate projections, all (B, H, T, N) scores in memory, a float32 softmax, one operator after
    the other. Has the state dict of :class:`lm2_kernels.ReleaseMemory`; tokens = slots.
    """

    def __init__(self, dim: int, num_heads: int = 8):
        super().__init__()
        # the released module's names, which swap_memory reads
        self.n_heads, self.num_blocks, self.use_topk, self.topk = num_heads, 1, False, 0
        self.attn_drop = nn.Dropout(0.0)
        self.query_proj = nn.Linear(dim, dim)
        self.key_proj = nn.Linear(dim, dim)
        self.value_proj = nn.Linear(dim, dim)
        self.attention_mlp = nn.ModuleList([nn.Linear(dim, dim)] * 2)
        self.attended_memory_layernorm = nn.LayerNorm(dim)
        self.attended_memory_layernorm2 = nn.LayerNorm(dim)
        self.input_gate_projector = nn.Module()
        self.input_gate_projector.w = nn.Parameter(torch.ones(dim))
        self.input_gate_projector.linear = nn.Linear(dim, 2 * dim)
        self.memory_gate_projector = nn.Module()
        self.memory_gate_projector.linear = nn.Linear(dim, 2 * dim)
        self.input_bias = nn.Parameter(torch.tensor(0.0))
        self.forget_bias = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, memory: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        """X and memory (B, T, D) -> output and new memory (B, T, D)."""
        new_memory = self._proposals(x, memory, memory, self._read(x, memory))
        return x + new_memory, new_memory

    def _proposals(self, x: Tensor, memory: Tensor, rows: Tensor, read: Tensor) -> Tensor:
        """What the tokens propose for ``rows``: the memory's (B, T, D), or (B, N, 1, D) of slots.

        ``read`` and the result have the tokens' shape, (B, T, D) or (B, N, tokens per slot, D).
        """
        attended = self.attended_memory_layernorm(rows + read)
        mixed = attended
        for layer in self.attention_mlp:
            mixed = torch.relu(layer(mixed))
        candidate = self.attended_memory_layernorm2(attended + mixed)
        pooled = torch.relu(self.input_gate_projector.w * x).mean(dim=1, keepdim=True)
        gates = self.input_gate_projector.linear(pooled)
        gates = gates + self.memory_gate_projector.linear(torch.tanh(memory))
        input_gate, forget_gate = gates.view(*rows.shape[:-1], -1).chunk(2, dim=-1)
        input_gate = torch.sigmoid(input_gate + self.input_bias)
        forget_gate = torch.sigmoid(forget_gate + self.forget_bias)
        return input_gate * torch.tanh(candidate) + forget_gate * rows

    def _read(self, x: Tensor, memory: Tensor) -> Tensor:
        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

        query, key = heads(self.query_proj(x)), heads(self.key_proj(memory))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
        softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
        probabilities = torch.softmax(scores, dim=-1, dtype=softmax_dtype).to(scores.dtype)
        return (probabilities @ heads(self.value_proj(memory))).transpose(1, 2).flatten(-2)


class SdpaPaperMemory(nn.Module):
    """The paper's layer in plain PyTorch over ``scaled_dot_product_attention``.

    What somebody who knows PyTorch would write. Has the state dict of
    :class:`lm2_kernels.PaperMemory`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kernel: SDPBackend | None = None,
        tokens_per_slot: int = 1,
    ):
        super().__init__()
        self.num_heads, self.kernel, self.tokens_per_slot = num_heads, kernel, tokens_per_slot
        for name in ("query", "key", "value", "output_gate", "input_gate", "forget_gate"):
            self.add_module(f"{name}_proj", nn.Linear(dim, dim, bias=False))

    def forward(self, x: Tensor, memory: Tensor, *, slot_offset: int = 0) -> tuple[Tensor, Tensor]:
        """X (B, T, D) and memory (B, N, D) -> output and new memory."""

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (self.num_heads, -1))

        chunks = (-1, self.tokens_per_slot)
        is_chunked = self.tokens_per_slot > 1
        sees = {}
        if not is_chunked:
            sees = sdpa_options(x.shape[1], memory.shape[1], slot_offset, x.device)
        read = sdpa(
            heads(self.query_proj(x)),
            heads(self.key_proj(memory)),
            heads(self.value_proj(memory)),
            self.kernel,
            **sees,
        ).flatten(-2)
        written = torch.sigmoid(self.input_gate_proj(x)) * torch.tanh(read)
        forget_gate = torch.sigmoid(self.forget_gate_proj(read))
        output = x + torch.sigmoid(self.output_gate_proj(read)) * read
        if is_chunked:
            kept = forget_gate.unflatten(1, chunks) * memory[:, :, None]
            return output, (written.unflatten(1, chunks) + kept).mean(dim=2)
        end = slot_offset + x.shape[1]
        new_rows = written + forget_gate * memory[:, slot_offset:end]
        if new_rows.shape != memory.shape:
            new_rows = torch.cat([memory[:, :slot_offset], new_rows, memory[:, end:]], dim=1)
        return output, new_rows


class SdpaReleaseMemory(ReleasedStyleMemory):
    """The released layer in plain PyTorch over ``scaled_dot_product_attention``.

    As :class:`SdpaPaperMemory`, with chunks too; its gate pools over the segment.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kernel: SDPBackend | None = None,
        tokens_per_slot: int = 1,
    ):
        super().__init__(dim, num_heads)
        self.kernel, self.tokens_per_slot = kernel, tokens_per_slot

    def forward(self, x: Tensor, memory: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        """X (B, T, D) and memory (B, N, D) -> output and new memory."""
        if self.tokens_per_slot == 1:
            return super().forward(x, memory)
        read = self._read(x, memory).unflatten(1, (-1, self.tokens_per_slot))
        proposals = self._proposals(x, memory, memory[:, :, None], read)
        return x + proposals.flatten(1, 2), proposals.mean(dim=2)

    def _read(self, x: Tensor, memory: Tensor) -> Tensor:
        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (self.n_heads, -1))

        return sdpa(
            heads(self.query_proj(x)),
            heads(self.key_proj(memory)),
            heads(self.value_proj(memory)),
            self.kernel,
            is_causal=self.tokens_per_slot == 1,
        ).flatten(-2)


def sdpa_options(
    num_tokens: int, num_slots: int, slot_offset: int, device: torch.device
) -> dict[str, object]:
    """How ``scaled_dot_product_attention`` is told what each token sees, the fastest way."""
    if slot_offset == 0 and num_tokens == num_slots:
        return {"is_causal": True}
    if slot_offset >= num_slots - 1:
        return {}  # every token sees all slots, as in decoding
    mask = reference.visible_slots(num_tokens, num_slots, slot_offset=slot_offset, device=device)
    return {"attn_mask": mask}


# None is torch's own choice
SDPA_KERNELS = {
    "SDPA": None,
    "SDPA math": SDPBackend.MATH,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
}


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: SDPBackend | None = None,
    **options: object,
) -> Tensor:
    """Memory attention (B, T, H, K) by ``scaled_dot_product_attention``, or that kernel of it."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)
