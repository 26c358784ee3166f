"""Batches of prompts of similar length, under a budget of tokens, that get smaller where memory does not suffice."""

import gc
import logging
from collections.abc import Callable, Sequence

import torch

from sft_lightning.generation.decoding.loop import Answer
from sft_lightning.system.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)


def answer_in_batches(
    prompts: Sequence[list[int]],
    answer: Callable[[list[int]], list[Answer]],
    *,
    max_new_tokens: int,
    batch_tokens: int,
    may_retry: bool,
) -> list[Answer]:
    """Returns an answer to each prompt, in order.

    Args:
        prompts: Token ids.
        answer: Answers the prompts at the given places.
        max_new_tokens: Of an answer.
        batch_tokens: Most tokens of a batch: rows x (longest prompt + max_new_tokens). A batch has at least one row.
        may_retry: Whether a batch that runs out of memory is tried again with half as many rows.

    Raises:
        torch.OutOfMemoryError: If one row alone does not fit, or nothing may be tried again.
    """
    # The longest prompts first: what does not fit into memory fails at once. Equal ones stand together.
    waiting = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), prompts[index]))
    answers: dict[int, Answer] = {}
    most_rows = len(prompts)
    while waiting:
        longest = len(prompts[waiting[0]]) + max_new_tokens
        batch = waiting[: min(most_rows, max(1, batch_tokens // longest))]
        try:
            answers.update(zip(batch, answer(batch), strict=True))
        except (RuntimeError, MemoryError) as error:
            if not may_retry or len(batch) == 1 or not is_out_of_memory(error):
                raise
            most_rows = len(batch) // 2
            logger.warning("out of memory with %d rows: going on with batches of %d at the most", len(batch), most_rows)
        else:
            waiting = waiting[len(batch) :]
            logger.info("generated %d of %d answers", len(answers), len(prompts))
            continue
        # Behind the except block, when the error and with it the failed call's tensors are gone.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return [answers[index] for index in range(len(prompts))]
