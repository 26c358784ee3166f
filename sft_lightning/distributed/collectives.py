"""All-gather Python objects across processes, and define the dtype of reduced sums."""

from typing import Any

import torch

# Apple's GPUs have no float64; everywhere else sums over millions of tokens stay exact enough to compare runs.
SUM_DTYPE = torch.float32 if torch.backends.mps.is_available() else torch.float64


def all_gather_objects(rows: list[Any], num_processes: int) -> list[list[Any]]:
    """Returns the rows of each process, by rank. All processes must call it."""
    if num_processes == 1:
        return [rows]
    parts: list[Any] = [None] * num_processes
    torch.distributed.all_gather_object(parts, rows)
    return parts


def all_gather_distinct(rows: list[Any], num_processes: int) -> list[Any]:
    """Returns the distinct rows of all processes, in order of rank. All processes must call it.

    Processes that are not distinct replicas, such as those of one tensor-parallel group, hold equal rows.

    Args:
        rows: Hashable rows of this process.
        num_processes: The world size.
    """
    return list(dict.fromkeys(row for part in all_gather_objects(rows, num_processes) for row in part))
