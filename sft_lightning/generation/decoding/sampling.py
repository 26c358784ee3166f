"""How the next token of each row is chosen, greedily or by sampling that depends on nothing but seed and answer."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class TokenSampler:
    """Chooses tokens by the model's logits.

    An answer is sampled with random numbers of its own, one for each token, that follow from ``seed`` and the number of
    the answer. So it depends on no other answer, on no order and on no state of a random generator.

    Args:
        greedy: Takes the most likely token; all else plays no part then.
        temperature: Divides the logits.
        top_p: Samples from the most likely tokens that hold this much of the probability.
        seed: Of the random numbers.
    """

    def __init__(self, *, greedy: bool, temperature: float, top_p: float, seed: int) -> None:
        self._temperature = 1.0 if greedy else temperature
        self._top_p = top_p
        self._seed = seed
        self._greedy = greedy

    def random_numbers(self, numbers: Sequence[int], num_tokens: int, device: torch.device) -> Tensor:
        """Returns uniform random numbers in [0, 1), shape [B, num_tokens], float32, a row for each answer number.

        Philox is a counter-based generator: its key, here seed and answer, names a stream (Salmon et al., "Parallel
        random numbers: as easy as 1, 2, 3").
        """
        if self._greedy:
            return torch.empty((len(numbers), num_tokens), device=device)
        keys = [np.array([self._seed % 2**64, number], dtype=np.uint64) for number in numbers]
        bits = np.stack([np.random.Philox(key=key).random_raw(num_tokens) for key in keys])
        return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).to(device)

    def __call__(self, logits: Tensor, random_numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the chosen tokens and the entropies of the distributions that they stand in.

        The entropy is that of the model's distribution at the sampling temperature (1 if greedy), before ``top_p``.

        Args:
            logits: Shape [B, V], any float dtype (computed in float32).
            random_numbers: Shape [B], float32, in [0, 1).

        Returns:
            Tokens, shape [B], int64, and entropies in nats, shape [B], float32.
        """
        logits = logits.float()
        if self._temperature != 1.0:
            logits = logits / self._temperature
        log_probabilities = logits.log_softmax(-1)
        probabilities = log_probabilities.exp()
        entropies = -(probabilities * log_probabilities).nansum(-1)  # 0 log 0 = 0
        if self._greedy:
            return logits.argmax(-1), entropies
        if self._top_p < 1.0:
            probabilities = probabilities * _nucleus(probabilities, self._top_p)
        return _sample(probabilities, random_numbers), entropies


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Returns which tokens are the most likely ones that hold ``top_p`` together, shape [B, V], bool.

    Holtzman et al., "The curious case of neural text degeneration". Of equals the first is the likelier.
    """
    descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
    held_before = descending.cumsum(-1) - descending
    return torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, held_before < top_p)


def _sample(probabilities: Tensor, random_numbers: Tensor) -> Tensor:
    """Returns for each row the token at whose place the running sum of probabilities exceeds the random number.

    The sum runs in the order of the vocabulary: sorted by probability, rounding could exchange two tokens.
    """
    running = probabilities.cumsum(-1)
    total = running[:, -1:]
    # Rounding may give the total itself, which no token exceeds.
    wanted = torch.minimum(random_numbers[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(running, wanted, right=True).squeeze(-1)
