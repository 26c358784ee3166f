"""A key-value cache of full attention whose rows start from a common prefix, grow in place and may leave."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

# transformers' own layer copies all that it holds for every new token. This one does when the room is used up.
_ROOM_TOKENS = 64


class RowCache(Cache):
    """Keys and values of the rows of one batch.

    Args:
        num_layers: Of the model.
        prefix: The cache of one row that all rows of this one begin with; it may serve any number of caches.
    """

    def __init__(self, num_layers: int, prefix: "RowCache | None" = None) -> None:
        prefixes = prefix.row_layers if prefix else [None] * num_layers
        self.row_layers: list[_RowLayer] = [_RowLayer(each) for each in prefixes]
        super().__init__(layers=list(self.row_layers))

    def add_rows(self, part: "RowCache", first: int, *, num_rows: int, num_slots: int, num_prefix: int) -> None:
        """Takes the rows of another cache, a part of the batch with prompts of its own width.

        What follows the prefix goes to the right end of the slots, and zeros stand between.

        Args:
            part: Holds the rows.
            first: Where the first of them stands in this cache.
            num_rows: Of the whole batch.
            num_slots: Of the batch's widest prompt, with the prefix.
            num_prefix: Tokens of the prefix.
        """
        for layer, other in zip(self.row_layers, part.row_layers, strict=True):
            for buffer, rows in zip(layer.buffers, other.buffers, strict=True):
                buffer.add_rows(rows.used, first, num_rows, num_slots, num_prefix)

    def repeat_rows(self, rows: Tensor) -> None:
        """Makes row ``rows[i]`` the new row i. ``rows``: Shape [B], int64."""
        for layer in self.row_layers:
            for buffer in layer.buffers:
                buffer.repeat_rows(rows)

    def move_rows(self, sources: Tensor, targets: Tensor) -> None:
        """Writes rows over others, so that those at the end may leave: the next update takes as many as it brings.

        Args:
            sources: Shape [M], int64, the rows to move.
            targets: Shape [M], int64, the rows that they take the place of.
        """
        for layer in self.row_layers:
            for buffer in layer.buffers:
                buffer.move_rows(sources, targets)


class _RowLayer(DynamicLayer):
    def __init__(self, prefix: "_RowLayer | None") -> None:
        super().__init__()
        self.buffers: list[_Buffer] = (
            [_Buffer(states.used) for states in prefix.buffers] if prefix else [_Buffer(), _Buffer()]
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (
            buffer.append(states) for buffer, states in zip(self.buffers, (key_states, value_states), strict=True)
        )
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.buffers[0].num_tokens


class _Buffer:
    """Keys or values, shape [B, H, T, E], with room for more tokens behind."""

    def __init__(self, prefix: Tensor | None = None) -> None:
        self._states = prefix
        self.num_tokens = 0 if prefix is None else prefix.shape[2]

    @property
    def used(self) -> Tensor:
        assert self._states is not None
        return self._states[:, :, : self.num_tokens]

    def append(self, new: Tensor) -> Tensor:
        num_rows, num_heads, num_new, size = new.shape
        num_tokens = self.num_tokens + num_new
        if self._states is None or self._states.shape[2] < num_tokens:
            # Under autocast keys come in float32, because of their rotation, and attention would cast them every time.
            device_type = new.device.type
            autocast = torch.is_autocast_enabled(device_type)
            dtype = torch.get_autocast_dtype(device_type) if autocast else new.dtype
            states = new.new_empty((num_rows, num_heads, num_tokens + _ROOM_TOKENS, size), dtype=dtype)
            if self._states is not None:
                states[:, :, : self.num_tokens] = self._states[:num_rows, :, : self.num_tokens]
            self._states = states
        states = self._states[:num_rows]
        states[:, :, self.num_tokens : num_tokens] = new
        self.num_tokens = num_tokens
        return states[:, :, :num_tokens]

    def add_rows(self, states: Tensor, first: int, num_rows: int, num_slots: int, num_prefix: int) -> None:
        num_own = states.shape[2] - num_prefix
        if self._states is None:
            _, num_heads, _, size = states.shape
            self._states = states.new_empty((num_rows, num_heads, num_slots + _ROOM_TOKENS, size))
            self.num_tokens = num_slots
        rows = self._states[first : first + len(states)]
        rows[:, :, :num_prefix] = states[:, :, :num_prefix]
        rows[:, :, num_prefix : num_slots - num_own] = 0  # masked, but what was there before may be no number
        rows[:, :, num_slots - num_own : num_slots] = states[:, :, num_prefix:]

    def repeat_rows(self, rows: Tensor) -> None:
        self._states = self.used.index_select(0, rows)

    def move_rows(self, sources: Tensor, targets: Tensor) -> None:
        self.used[targets] = self.used[sources]
