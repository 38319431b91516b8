"""The state that a model carries from segment to segment, as one explicit value."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["MemoryState"]

_FORMAT = "lm2_kernels.MemoryState"


class MemoryState:
    """The memory banks between two segments. Every method returns a new state.

    Attributes:
        banks: tensors (B, N, D): one where the memory flows through depth, one a memory layer where
            it flows through time.

    Raises:
        TypeError, ValueError: the banks are not tensors of one shape.
    """

    def __init__(self, banks: Sequence[Tensor]):
        self.banks = tuple(banks)
        for bank in self.banks:
            if not isinstance(bank, Tensor) or not bank.is_floating_point():
                raise TypeError("MemoryState: banks must be floating-point tensors")
            if bank.dim() != 3 or bank.shape != self.banks[0].shape:
                shapes = [tuple(bank.shape) for bank in self.banks]
                raise ValueError(f"MemoryState: banks must all be of one (B, N, D), got {shapes}")
        if not self.banks:
            raise ValueError("MemoryState: no bank")

    @property
    def batch(self) -> int:
        """B."""
        return self.banks[0].shape[0]

    def __repr__(self) -> str:
        bank = self.banks[0]
        return f"MemoryState({len(self.banks)} x {tuple(bank.shape)}, {bank.dtype}, {bank.device})"

    def check(self, num_banks: int, batch: int, slots: int, dim: int) -> None:
        """Raise ValueError unless the state is of these sizes; a batch of 1 is not expanded."""
        wanted, got = (slots, dim), tuple(self.banks[0].shape[1:])
        if len(self.banks) != num_banks:
            raise ValueError(
                f"MemoryState: the model has {num_banks} memory banks, the state "
                f"{len(self.banks)}: it is of another configuration"
            )
        if got != wanted:
            raise ValueError(
                f"MemoryState: the model's banks are (slots, width) = {wanted}, the state's "
                f"{got}: it is of another configuration"
            )
        if self.batch != batch:
            raise ValueError(
                f"MemoryState: the input has {batch} rows, the state {self.batch}; give each row "
                f"its own with select() or expand()"
            )

    def _map(self, function: Callable[[Tensor], Tensor]) -> "MemoryState":
        return MemoryState([function(bank) for bank in self.banks])

    def detach(self) -> "MemoryState":
        """Without its history: gradients stop here."""
        return self._map(torch.Tensor.detach)

    def to(self, *args, **kwargs) -> "MemoryState":
        """On another device or in another dtype, as ``Tensor.to``."""
        return self._map(lambda bank: bank.to(*args, **kwargs))

    def select(self, rows: Tensor | Sequence[int]) -> "MemoryState":
        """The batch rows of these indices, in this order and as often as they come."""
        index = self._index(rows)
        return self._map(lambda bank: bank.index_select(0, index))

    def expand(self, times: int) -> "MemoryState":
        """Each batch row this many times in a row, as beam search wants them."""
        if not isinstance(times, int) or times < 1:
            raise ValueError(f"MemoryState.expand: times must be an int of at least 1, got {times}")
        return self._map(lambda bank: bank.repeat_interleave(times, dim=0))

    def reset(self, rows: Tensor | Sequence[int], initial: "MemoryState") -> "MemoryState":
        """These batch rows as they are before the first segment, the others as they are.

        Args:
            rows: indices, or a bool tensor (B,).
            initial: what to reset to, of batch 1: ``model.initial_state(1)``.
        """
        if initial.batch != 1:
            raise ValueError(f"MemoryState.reset: initial must be of batch 1, got {initial.batch}")
        initial.check(len(self.banks), 1, *self.banks[0].shape[1:])
        mask = torch.zeros(self.batch, dtype=torch.bool, device=self.banks[0].device)
        mask[self._index(rows)] = True
        # not a product with 0 or 1: what is reset may be NaN
        banks = zip(self.banks, initial.banks, strict=True)
        return MemoryState(
            [torch.where(mask[:, None, None], new.to(old), old) for old, new in banks]
        )

    def _index(self, rows: Tensor | Sequence[int]) -> Tensor:
        index = torch.as_tensor(rows, device=self.banks[0].device)
        if index.dtype == torch.bool and index.shape == (self.batch,):
            return index.nonzero()[:, 0]
        if index.numel() == 0:
            index = index.long()
        if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"MemoryState: rows must be integer indices, or a bool tensor ({self.batch},), got "
                f"{index.dtype} {tuple(index.shape)}"
            )
        if ((index < 0) | (index >= self.batch)).any():
            raise ValueError(
                f"MemoryState: rows must be from 0 to {self.batch - 1}, got {index.tolist()}"
            )
        return index.long()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file  # noqa: PLC0415 - computing needs torch alone

        tensors = {
            # one copy each: banks may share their memory
            f"bank.{index}": bank.detach().clone(memory_format=torch.contiguous_format)
            for index, bank in enumerate(self.banks)
        }
        save_file(tensors, path, metadata={"format": _FORMAT})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "MemoryState":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is damaged, or holds something else.
        """
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - as above

        try:
            with safe_open(path, "pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                found = (file.metadata() or {}).get("format")
        except SafetensorError as error:
            raise ValueError(
                f"MemoryState.load: {path} is not a safetensors file: {error}"
            ) from None
        names = [f"bank.{index}" for index in range(len(tensors))]
        if found != _FORMAT or set(names) != set(tensors):
            raise ValueError(f"MemoryState.load: {path} holds no memory state")
        return cls([tensors[name] for name in names])
