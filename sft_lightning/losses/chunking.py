"""Choose how many labels a chunk of ``linear_cross_entropy`` holds."""

# A chunk of any height costs one pass over the weight and its gradient, which dominates in low chunks.
# 256 MiB are 441 rows of a vocabulary of 151,936: on a CPU the three matrix products then run at 98% of their speed at
# 882 rows (at 110 rows 84%), and the chunk is small beside the weight's gradient (890 MiB).
_LEAST_BUDGET_BYTES = 256 * 2**20
# By its data sheet, a GPU adds a low chunk to the weight's gradient more slowly than it computes it: 1.25 GiB of 80.
_BUDGET_SHARE = 64
# A CPU gains nothing from more rows, and with a small vocabulary pays for buffers of more than 32 MiB, which are mapped
# page by page: 1,750 rows of 6,016 tokens took 145 ms in chunks of 697, 152 ms in chunks of 1,045, 170 ms in one.
_MOST_ROWS_ON_CPU = 768


def budget_bytes(cuda_memory_bytes: int = 0) -> int:
    """Returns the memory budget of the float32 logits of a chunk.

    Args:
        cuda_memory_bytes: Of the CUDA device; 0 for other devices.
    """
    return max(_LEAST_BUDGET_BYTES, cuda_memory_bytes // _BUDGET_SHARE)


def num_chunk_rows(num_labels: int, row_bytes: int, *, budget_bytes: int, on_cpu: bool) -> int:
    """Returns the number of labels in each chunk but the last, at least one.

    Args:
        num_labels: M.
        row_bytes: Of one label's logits, in float32 or float64.
        budget_bytes: Of the logits of a chunk.
        on_cpu: Whether the CPU's limit on rows applies.

    Example:
        >>> num_chunk_rows(1600, 4, budget_bytes=2**28, on_cpu=True)
        534
    """
    most_rows = max(1, budget_bytes // row_bytes)
    if on_cpu:
        most_rows = min(most_rows, _MOST_ROWS_ON_CPU)
    num_chunks = -(-num_labels // most_rows)
    return -(-num_labels // num_chunks)
