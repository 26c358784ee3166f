"""A key-value cache of full attention whose rows start from a common prefix, grow in place and may leave.

    slots of a row:  | prefix | padding | rest of the prompt | answer ... | room for more |

Attention sees all slots, those without a token through the mask as padding. A view without the room would have gaps
between rows, over which it takes a CPU twice as long to read; and transformers' own cache, which has no room, copies
all that it holds for every new token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

# More room is copied to less often, and more of it is read without use.
ROOM_TOKENS = 16


class KVCache(Cache):
    """Keys and values of the rows of one batch.

    Args:
        num_layers: Of the model.
        prefix: The cache of one row that all rows of this one begin with; it may serve any number of caches.
    """

    def __init__(self, num_layers: int, prefix: "KVCache | None" = None) -> None:
        prefixes = prefix.row_layers if prefix else [None] * num_layers
        self.row_layers: list[_KVLayer] = [_KVLayer(each) for each in prefixes]
        super().__init__(layers=list(self.row_layers))

    @classmethod
    def of_parts(cls, parts: "list[KVCache]", num_prefix: int) -> "KVCache":
        """Returns the rows of several caches in one, with room for more tokens, and takes them out of those.

        What follows the prefix goes to the right end of the slots of the widest, and zeros stand between.

        Args:
            parts: Caches with slots of their own number each.
            num_prefix: Slots of the prefix, the same in all.
        """
        whole = cls(len(parts[0].row_layers))
        for index, layer in enumerate(whole.row_layers):
            of_parts = [part.row_layers[index].buffers for part in parts]
            layer.buffers = [_Buffer.of_parts(list(each), num_prefix) for each in zip(*of_parts, strict=True)]
            for buffers in of_parts:
                buffers.clear()
        return whole

    def num_slots(self, num_new_tokens: int) -> int:
        """Returns how many slots attention is going to see with so many tokens more."""
        return self.row_layers[0].get_mask_sizes(num_new_tokens)[0]

    def repeat_rows(self, rows: Tensor) -> None:
        """Makes row ``rows[i]`` the new row i. ``rows``: Shape [B], int64."""
        for layer in self.row_layers:
            for buffer in layer.buffers:
                buffer.states = buffer.states.index_select(0, rows)

    def move_rows(self, sources: Tensor, targets: Tensor) -> None:
        """Writes rows over others, so that those at the end may leave: the next update takes as many as it brings.

        Args:
            sources: Shape [M], int64, the rows to move.
            targets: Shape [M], int64, the rows that they take the place of.
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
        states: Shape [B, H, S, E], contiguous. Rows behind those in use may stand at the end.
        num_tokens: How many of the slots hold tokens.
    """

    def __init__(self, states: Tensor, num_tokens: int, room_tokens: int = 0) -> None:
        self.states = states
        self.num_tokens = num_tokens
        self._room_tokens = room_tokens

    @classmethod
    def of_parts(cls, parts: "list[_Buffer]", num_prefix: int) -> "_Buffer":
        num_tokens = max(part.num_tokens for part in parts)
        num_rows = sum(len(part.states) for part in parts)
        _, num_heads, _, size = parts[0].states.shape
        states = parts[0].states.new_empty((num_rows, num_heads, num_tokens + ROOM_TOKENS, size))
        states[:, :, num_tokens:] = 0
        first = 0
        for part in parts:
            rows = states[first : first + len(part.states)]
            start = num_tokens - (part.num_tokens - num_prefix)
            rows[:, :, :num_prefix] = part.states[:, :, :num_prefix]
            rows[:, :, num_prefix:start] = 0  # masked, but what was there before might be no number
            rows[:, :, start:num_tokens] = part.states[:, :, num_prefix : part.num_tokens]
            first += len(rows)
        return cls(states, num_tokens, ROOM_TOKENS)

    def num_slots(self, num_new: int) -> int:
        num_slots, num_needed = self.states.shape[2], self.num_tokens + num_new
        return num_slots if num_needed <= num_slots else num_needed + self._room_tokens

    def append(self, new: Tensor) -> Tensor:
        num_rows, num_heads, num_new, size = new.shape
        num_tokens = self.num_tokens + num_new
        num_slots = self.num_slots(num_new)
        if self.states.shape[2] < num_slots:
            # Under autocast keys come in float32, because of their rotation, and attention would cast them every time.
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
