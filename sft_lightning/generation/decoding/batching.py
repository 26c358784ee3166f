"""Answer prompts in batches of similar length under a token budget; halve batches that run out of memory."""

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
        answer: Answers the prompts with the given indices.
        max_new_tokens: Maximum length of an answer.
        batch_tokens: Maximum tokens of a batch: rows x (longest prompt + max_new_tokens). A batch has at least one row.
        may_retry: Whether a batch that runs out of memory is tried again with half as many rows.

    Raises:
        torch.OutOfMemoryError: If a single row does not fit, or ``may_retry`` is False.
    """
    # The longest prompts first, so that running out of memory happens early. Equal prompts are adjacent.
    waiting = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), prompts[index]))
    answers: dict[int, Answer] = {}
    max_rows = len(prompts)
    while waiting:
        longest = len(prompts[waiting[0]]) + max_new_tokens
        batch = waiting[: min(max_rows, max(1, batch_tokens // longest))]
        try:
            answers.update(zip(batch, answer(batch), strict=True))
        except (RuntimeError, MemoryError) as error:
            if not may_retry or len(batch) == 1 or not is_out_of_memory(error):
                raise
            max_rows = len(batch) // 2
            logger.warning("out of memory with %d rows: continuing with batches of at most %d", len(batch), max_rows)
        else:
            waiting = waiting[len(batch) :]
            logger.info("generated %d of %d answers", len(answers), len(prompts))
            continue
        # After the except block, when the error and with it the tensors of the failed call are freed.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return [answers[index] for index in range(len(prompts))]
