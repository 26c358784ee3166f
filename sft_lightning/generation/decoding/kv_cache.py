"""Cache keys and values of rows that share a prefix, grow in place and may be removed.

    slots of a row:  | prefix | padding | rest of the prompt | answer ... | spare slots |

Attention sees all slots; the mask marks those without a token as padding. A view without the spare slots would have
gaps between rows, which a CPU takes twice as long to read. The cache of transformers has no spare slots and copies
its whole content for every new token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

# More spare slots mean fewer copies, and more slots that are read in vain.
SPARE_SLOTS = 16


class KVCache(Cache):
    """Keys and values of the rows of one batch.

    Args:
        num_layers: Number of layers of the model.
        prefix: Cache of one row, the common prefix of all rows here. Several caches may share it.
    """

    def __init__(self, num_layers: int, prefix: "KVCache | None" = None) -> None:
        prefixes = prefix.row_layers if prefix else [None] * num_layers
        self.row_layers: list[_KVLayer] = [_KVLayer(each) for each in prefixes]
        super().__init__(layers=list(self.row_layers))

    @classmethod
    def of_parts(cls, parts: "list[KVCache]", num_prefix: int) -> "KVCache":
        """Moves the rows of several caches into a new one with spare slots.

        Tokens after the prefix are aligned to the right end of the widest part, with zeros in between.

        Args:
            parts: Caches, each with its own number of slots. They are empty afterwards.
            num_prefix: Slots of the prefix, equal in all parts.
        """
        whole = cls(len(parts[0].row_layers))
        for index, layer in enumerate(whole.row_layers):
            of_parts = [part.row_layers[index].buffers for part in parts]
            layer.buffers = [_Buffer.of_parts(list(each), num_prefix) for each in zip(*of_parts, strict=True)]
            for buffers in of_parts:
                buffers.clear()
        return whole

    def num_slots(self, num_new_tokens: int) -> int:
        """Returns how many slots attention sees after ``num_new_tokens`` more tokens."""
        return self.row_layers[0].get_mask_sizes(num_new_tokens)[0]

    def repeat_rows(self, rows: Tensor) -> None:
        """Replaces row i by row ``rows[i]``. ``rows``: Shape [B], int64."""
        for layer in self.row_layers:
            for buffer in layer.buffers:
                buffer.states = buffer.states.index_select(0, rows)

    def move_rows(self, sources: Tensor, targets: Tensor) -> None:
        """Copies rows over others, so that rows at the end can be dropped: the next update decides how many stay.

        Args:
            sources: Shape [M], int64, the rows to move.
            targets: Shape [M], int64, the rows to overwrite.
        """
        for layer in self.row_layers:
            for buffer in layer.buffers:
                buffer.states[targets] = buffer.states[sources]


class _KVLayer(DynamicLayer):
    def __init__(self, prefix: "_KVLayer | None") -> None:
        super().__init__()
        self.buffers: list[_Buffer] = []
        if prefix:
            self.buffers = [_Buffer(buffer.states, buffer.num_tokens) for buffer in prefix.buffers]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = (key_states, value_states)
        if not self.buffers:
            self.buffers = [_Buffer(states[:, :, :0], 0) for states in new]
        self.keys, self.values = (buffer.append(states) for buffer, states in zip(self.buffers, new, strict=True))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.buffers[0].num_tokens if self.buffers else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.buffers[0].num_slots(query_length) if self.buffers else query_length), 0


class _Buffer:
    """Keys or values.

    Attributes:
        states: Shape [B, H, S, E], contiguous. Rows at the end may be unused.
        num_tokens: Number of slots that hold tokens.
    """

    def __init__(self, states: Tensor, num_tokens: int, spare_slots: int = 0) -> None:
        self.states = states
        self.num_tokens = num_tokens
        self._spare_slots = spare_slots

    @classmethod
    def of_parts(cls, parts: "list[_Buffer]", num_prefix: int) -> "_Buffer":
        num_tokens = max(part.num_tokens for part in parts)
        num_rows = sum(len(part.states) for part in parts)
        _, num_heads, _, size = parts[0].states.shape
        states = parts[0].states.new_empty((num_rows, num_heads, num_tokens + SPARE_SLOTS, size))
        states[:, :, num_tokens:] = 0
        first = 0
        for part in parts:
            rows = states[first : first + len(part.states)]
            start = num_tokens - (part.num_tokens - num_prefix)
            rows[:, :, :num_prefix] = part.states[:, :, :num_prefix]
            rows[:, :, num_prefix:start] = 0  # masked, but uninitialized memory might hold NaN
            rows[:, :, start:num_tokens] = part.states[:, :, num_prefix : part.num_tokens]
            first += len(rows)
        return cls(states, num_tokens, SPARE_SLOTS)

    def num_slots(self, num_new: int) -> int:
        num_slots, num_needed = self.states.shape[2], self.num_tokens + num_new
        return num_slots if num_needed <= num_slots else num_needed + self._spare_slots

    def append(self, new: Tensor) -> Tensor:
        num_rows, num_heads, num_new, size = new.shape
        num_tokens = self.num_tokens + num_new
        num_slots = self.num_slots(num_new)
        if self.states.shape[2] < num_slots:
            # Under autocast the rotation returns keys in float32, and attention would cast them each time.
            device_type = new.device.type
            autocast = torch.is_autocast_enabled(device_type)
            dtype = torch.get_autocast_dtype(device_type) if autocast else new.dtype
            states = new.new_empty((num_rows, num_heads, num_slots, size), dtype=dtype)
            states[:, :, : self.num_tokens] = self.states[:num_rows, :, : self.num_tokens]
            states[:, :, num_tokens:] = 0
            self.states = states
        states = self.states[:num_rows]
        states[:, :, self.num_tokens : num_tokens] = new
        self.num_tokens = num_tokens
        return states
