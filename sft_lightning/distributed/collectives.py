"""What each process has of something, on all of them."""

from typing import Any

import torch


def all_gather_objects(rows: list[Any], num_processes: int) -> list[list[Any]]:
    """Returns the rows of each process, by its rank. All processes have to call it."""
    if num_processes == 1:
        return [rows]
    parts: list[Any] = [None] * num_processes
    torch.distributed.all_gather_object(parts, rows)
    return parts
