"""Choose the next token of each row, greedily or by sampling that depends only on seed and answer."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class TokenSampler:
    """Chooses tokens from logits.

    Each answer has its own random numbers, one for each token, that follow from ``seed`` and the number of the answer.
    So a sampled answer does not depend on other answers, their order, or the state of a random generator.

    Args:
        greedy: Takes the most likely token; the other arguments are then ignored.
        temperature: Divides the logits.
        top_p: Samples from the most likely tokens that hold this much of the probability.
        seed: Seed of the random numbers.
    """

    def __init__(self, *, greedy: bool, temperature: float, top_p: float, seed: int) -> None:
        self._temperature = 1.0 if greedy else temperature
        self._top_p = top_p
        self._seed = seed
        self._greedy = greedy

    def random_numbers(self, numbers: Sequence[int], num_tokens: int, device: torch.device) -> Tensor:
        """Returns uniform random numbers in [0, 1). Shape [B, num_tokens], float32, a row for each answer number.

        Philox is a counter-based generator: its key, here seed and answer, selects a stream (Salmon et al., "Parallel
        random numbers: as easy as 1, 2, 3").
        """
        if self._greedy:
            return torch.empty((len(numbers), num_tokens), device=device)
        keys = [np.array([self._seed % 2**64, number], dtype=np.uint64) for number in numbers]
        bits = np.stack([np.random.Philox(key=key).random_raw(num_tokens) for key in keys])
        return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).to(device)

    def __call__(self, logits: Tensor, random_numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the chosen tokens and the entropies of their distributions.

        The entropy is that of the distribution at the sampling temperature (1 if greedy), before ``top_p``.

        Args:
            logits: Shape [B, V], any float dtype (computed in float32).
            random_numbers: Shape [B], float32, in [0, 1).

        Returns:
            Tokens, shape [B], int64, and entropies in nats, shape [B], float32. Where the logits are no distribution,
            because one of them is NaN or +inf, the entropy is NaN and the token arbitrary.
        """
        logits = logits.float()
        if self._temperature != 1.0:
            logits = logits / self._temperature
        log_probabilities = logits.log_softmax(-1)
        probabilities = log_probabilities.exp()
        # 0 log 0 = 0, while NaN stays NaN.
        entropies = -(probabilities * log_probabilities.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
        if self._greedy:
            return logits.argmax(-1), entropies
        if self._top_p < 1.0:
            probabilities = probabilities * _nucleus(probabilities, self._top_p)
        return _sample(probabilities, random_numbers), entropies


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Returns the most likely tokens whose total probability reaches ``top_p``. Shape [B, V], bool.

    Holtzman et al., "The curious case of neural text degeneration". Ties go to the first token.
    """
    descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
    held_before = descending.cumsum(-1) - descending
    return torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, held_before < top_p)


def _sample(probabilities: Tensor, random_numbers: Tensor) -> Tensor:
    """Returns for each row the first token at which the cumulative probability exceeds the random number.

    The sum is in the order of the vocabulary: sorted by probability, rounding could swap two tokens.
    """
    running = probabilities.cumsum(-1)
    total = running[:, -1:]
    # Rounding may give the total itself, which no cumulative sum exceeds.
    wanted = torch.minimum(random_numbers[:, None] * total, total.nextafter(torch.zeros_like(total)))
    tokens = torch.searchsorted(running, wanted, right=True).squeeze(-1)
    return tokens.clamp(max=probabilities.shape[-1] - 1)  # where all are NaN, no sum exceeds the number
