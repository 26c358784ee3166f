"""Compute losses and entropies of response tokens as pure functions of logits.

Losses are in nats and computed in float32, or in float64 for float64 logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sft_lightning.errors import UserError


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the negative log-likelihood of each label, unreduced.

    Args:
        logits: Shape [..., V], any floating dtype.
        labels: Shape [...], int64, in [0, V). A label of -100 means "no label" and gives 0, as in torch.

    Returns:
        Shape [...], float32 (float64 for float64 logits), in nats.

    Example:
        >>> token_nll(torch.zeros(2, 4), torch.tensor([0, 3]))  # four equally likely tokens: log(4)
        tensor([1.3863, 1.3863])
    """
    num_tokens_in_vocabulary = logits.shape[-1]
    losses = F.cross_entropy(
        _in_float32(logits).reshape(-1, num_tokens_in_vocabulary), labels.reshape(-1), reduction="none"
    )
    return losses.view(labels.shape)


def masked_normalize(tensor: Tensor, mask: Tensor, normalize_constant: float, dim: int | None = None) -> Tensor:
    """Returns the sum of the masked-in elements divided by a constant, never by the mask's count.

    Args:
        tensor: Any shape. Masked-out elements have no influence, not even inf or NaN.
        mask: Shape of ``tensor``, bool or 0 and 1; True counts.
        normalize_constant: Divisor of the sum.
        dim: Dimension to sum along; all of them when None.

    Returns:
        ``tensor`` without dimension ``dim``, or a scalar when ``dim`` is None; dtype of ``tensor``.

    Example:
        >>> tensor, mask = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1, 0], [1, 1]])
        >>> masked_normalize(tensor, mask, normalize_constant=2.0, dim=1)
        tensor([0.5000, 3.5000])
    """
    return tensor.masked_fill(~mask.bool(), 0).sum(dim) / normalize_constant


def compute_entropy(logits: Tensor) -> Tensor:
    """Returns the entropy of each next-token distribution.

    Args:
        logits: Shape [B, T, V], any floating dtype. A logit of -inf is a probability of 0.

    Returns:
        Shape [B, T], float32 (float64 for float64 logits), in nats.

    Example:
        >>> compute_entropy(torch.zeros(1, 1, 8))  # log(8)
        tensor([[2.0794]])
    """
    logits = _in_float32(logits)
    # logsumexp subtracts the maximum and adds it again, which would lose a few digits at logits of 1e4.
    shifted = logits - logits.detach().amax(dim=-1, keepdim=True)
    log_probs = shifted - shifted.logsumexp(dim=-1, keepdim=True)
    # 0 * -inf is NaN; 0 times the smallest finite number is the 0 that p log p tends to.
    finite_log_probs = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return -(log_probs.exp() * finite_log_probs).sum(dim=-1)


def get_response_log_probs(
    model: nn.Module, input_ids: Tensor, labels: Tensor, return_token_entropy: bool = False
) -> dict[str, Tensor]:
    """Returns the log-probability that the model gives each label, prompt and padding included.

    Neither shifts nor masks: ``labels[:, t]`` is the token after ``input_ids[:, : t + 1]``, and the caller applies
    ``response_mask``. No attention mask is passed: padding is on the right, where causal attention does not look.

    Args:
        model: A causal language model of transformers.
        input_ids: Shape [B, T], int64.
        labels: Shape [B, T], int64. A label of -100 gives a log-probability of 0.
        return_token_entropy: Adds ``token_entropy``.

    Returns:
        ``log_probs``, shape [B, T], float32, in nats, with gradient. On request ``token_entropy``, shape [B, T],
        float32, in nats, without gradient, for logging (``compute_entropy`` has one).

    Example:
        >>> from types import SimpleNamespace
        >>> model = lambda input_ids, use_cache: SimpleNamespace(logits=torch.zeros(1, 2, 4))
        >>> get_response_log_probs(model, torch.tensor([[0, 1]]), torch.tensor([[1, 2]]))
        {'log_probs': tensor([[-1.3863, -1.3863]])}
    """
    logits = model(input_ids, use_cache=False).logits
    outputs = {"log_probs": -token_nll(logits, labels)}
    if return_token_entropy:
        with torch.no_grad():  # row by row, so that only one row's probabilities are in memory at a time
            outputs["token_entropy"] = torch.stack([compute_entropy(row) for row in logits])
    return outputs


def sft_microbatch_train_step(
    policy_log_probs: Tensor,
    response_mask: Tensor,
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Calls backward on one micro-batch's share of the loss and returns that share.

    The loss is ``-1 / gradient_accumulation_steps`` times the mean over rows of the row's sum of response
    log-probabilities divided by ``normalize_constant``.

    Args:
        policy_log_probs: Shape [B, T], from ``get_response_log_probs``, with gradient.
        response_mask: Shape [B, T], bool or 0 and 1; True counts in the loss.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        normalize_constant: Divisor of each row's sum.

    Returns:
        The loss, a scalar without gradient, and for logging the scalars ``nll_sum`` (nats) and
        ``num_response_tokens`` (int64); sum each over micro-batches before dividing one by the other.

    Example:
        >>> log_probs = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]], requires_grad=True)
        >>> loss, metadata = sft_microbatch_train_step(log_probs, torch.tensor([[1, 1], [1, 0]]), 2)
        >>> loss.item(), metadata["num_response_tokens"].item()
        (1.5, 3)
        >>> log_probs.grad
        tensor([[-0.2500, -0.2500],
                [-0.2500,  0.0000]])
    """
    row_sums = masked_normalize(policy_log_probs, response_mask, normalize_constant, dim=-1)
    loss = -row_sums.mean() / gradient_accumulation_steps
    loss.backward()
    metadata = {
        "nll_sum": -masked_normalize(policy_log_probs.detach(), response_mask, 1.0),
        "num_response_tokens": response_mask.sum(),
    }
    return loss.detach(), metadata


def compute_sft_loss(model: nn.Module, input_ids: Tensor, labels: Tensor, response_mask: Tensor) -> Tensor:
    """Returns the mean cross-entropy over response tokens, with gradient.

    Takes the result of ``tokenize_prompt_and_output``. Ignores labels outside of the response.

    Args:
        model: A causal language model of transformers.
        input_ids: Shape [B, T], int64, padded on the right.
        labels: Shape [B, T], int64.
        response_mask: Shape [B, T], bool or 0 and 1; True counts in the loss.

    Returns:
        Scalar, float32, in nats per response token.

    Raises:
        UserError: If ``response_mask`` is False everywhere: the mean of nothing is not a number.

    Example:
        >>> from types import SimpleNamespace
        >>> model = lambda input_ids, use_cache: SimpleNamespace(logits=torch.zeros(1, 2, 4))
        >>> compute_sft_loss(model, torch.tensor([[0, 1]]), torch.tensor([[1, 2]]), torch.tensor([[0, 1]]))
        tensor(1.3863)
    """
    in_response = response_mask.bool()
    if not in_response.any():
        raise UserError(f"response_mask of shape {tuple(response_mask.shape)} is False everywhere; skip such a batch")
    logits = model(input_ids, use_cache=False).logits
    return token_nll(logits[in_response], labels[in_response]).mean()


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
