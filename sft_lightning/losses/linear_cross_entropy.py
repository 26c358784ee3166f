"""Compute the output embedding and the cross-entropy chunk by chunk, without the logits of all M labels at once.

Gradients are computed in the forward pass, from the probabilities of each chunk, so that nothing is computed twice and
only the weight's own gradient of size V outlives its chunk. The idea is that of Liger Kernel's fused linear
cross-entropy (https://arxiv.org/abs/2410.10989); this is plain torch and runs on every device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_lightning.losses import chunking as loss_chunks
from sft_lightning.losses.base import LabelLosses

# Width of the blocks in which the largest logit is searched; most vocabularies are padded to a multiple of it.
_BLOCK = 64
# Size of the partial products that are added to a float32 gradient if the matrix product cannot accumulate into it.
_PARTIAL_ELEMENTS = 2**24
# float16 gradients are computed with loss weights scaled up to this maximum: a probability times a typical weight of
# 1 / n would underflow below 6e-8, and 128 leaves room for a row's sum over the vocabulary below 65504.
_FLOAT16_LARGEST_WEIGHT = 128.0


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss_weights: Tensor,
    *,
    softcap: float | None = None,
    scale: float | None = None,
    with_entropy: bool = False,
    chunk_bytes: int | None = None,
) -> LabelLosses:
    """Returns the weighted sum of the labels' cross-entropy with gradient, and statistics without.

    The logits are ``scale * (hidden @ weight.T + bias)``, then ``softcap * tanh(logits / softcap)``. The matrix
    products run in the dtype of ``hidden``, or of autocast if it is on; everything between them, and the sum of the
    weight's gradient over chunks, in float32 (float64 stays float64).

    This call also computes the gradients of ``hidden``, ``weight`` and ``bias``, each only if it is needed, and none
    under ``torch.no_grad``. It supports one backward pass: neither retain_graph nor second derivatives.

    Args:
        hidden: Shape [M, D], M >= 1, floating, the hidden states that predict the labels.
        weight: Shape [V, D], of the output embedding, in the dtype of ``hidden`` unless autocast is on.
        bias: Shape [V], or None.
        labels: Shape [M], int64, in [0, V).
        loss_weights: Shape [M], float64, constant, the weight of each label in the sum.
        softcap: Bound of the logits, as in Gemma 2.
        scale: Factor of the logits, as in Cohere (its inverse in Granite).
        with_entropy: Whether to compute ``entropy``. Costs a second float32 buffer of the size of a chunk.
        chunk_bytes: Upper bound of a chunk's float32 logits, at least one row; by default 256 MiB, or on CUDA a 64th of
            the device's memory if that is more. 16-bit logits, an entropy, and a softcap in training take another
            buffer of this size each. A CPU computes at most 768 rows at once.

    Example:
        >>> hidden, weight = torch.zeros(2, 3), torch.zeros(4, 3)  # four equally likely tokens: log(4)
        >>> losses = linear_cross_entropy(hidden, weight, None, torch.tensor([0, 3]), torch.tensor([0.5, 0.5]))
        >>> losses.weighted_sum, losses.correct
        (tensor(1.3863), tensor([ True, False]))
    """
    device_type, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    logits_dtype = torch.promote_types(dtype, torch.float32)
    if chunk_bytes is None:
        chunk_bytes = _budget_bytes(hidden.device)
    num_chunk_rows = loss_chunks.num_chunk_rows(
        len(labels), weight.shape[0] * logits_dtype.itemsize, budget_bytes=chunk_bytes, on_cpu=device_type == "cpu"
    )
    options = _Options(
        dtype=dtype,
        logits_dtype=logits_dtype,
        num_chunk_rows=num_chunk_rows,
        softcap=softcap,
        scale=1.0 if scale is None else scale,
        with_entropy=with_entropy,
        # Inside an autograd function gradients are always off, and needs_input_grad ignores no_grad.
        with_gradients=torch.is_grad_enabled(),
    )
    return LabelLosses(*_apply(hidden, weight, bias, labels, loss_weights, options))


def _budget_bytes(device: torch.device) -> int:
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return loss_chunks.budget_bytes(memory)


@dataclass(frozen=True, slots=True)
class _Options:
    dtype: torch.dtype  # of the matrix products
    logits_dtype: torch.dtype  # of everything between them
    num_chunk_rows: int
    softcap: float | None
    scale: float
    with_entropy: bool
    with_gradients: bool


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        loss_weights: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        with torch.autocast(hidden.device.type, enabled=False):
            needed = [options.with_gradients and needed for needed in ctx.needs_input_grad[:3]]
            run = _Pass(hidden, weight, bias, loss_weights, needed, options)
            for start in range(0, len(labels), options.num_chunk_rows):
                run.add_chunk(slice(start, start + options.num_chunk_rows), labels)
        watched = (run.nll, run.correct, run.entropy)
        ctx.mark_non_differentiable(*(output for output in watched if output is not None))
        ctx.set_materialize_grads(False)
        ctx.unit = run.unit
        ctx.gradients = (run.grad_hidden, run.grad_weight, run.grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        # In the float64 of the weights, so that the sum does not depend on the order of the labels.
        return (run.nll.to(loss_weights.dtype) @ loss_weights).to(options.logits_dtype), *watched

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        # Released and scaled in place: a copy of the weight's gradient would be the largest tensor of all.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_cross_entropy keeps its gradients for one backward pass only")
        factor = (grad_sum / ctx.unit).to(grad_sum.dtype)
        scaled = (
            None if gradient is None else gradient.to(factor.dtype).mul_(factor).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None)


# A compiler would undo the sharing of buffers, and does not support addmm's out_dtype (pytorch issue 163880).
_apply = torch.compiler.disable(_LinearCrossEntropy.apply)


class _Pass:
    """One forward pass: the buffers that all chunks share, and the results."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss_weights: Tensor,
        needed: list[bool],
        options: _Options,
    ) -> None:
        self.options = options
        self.hidden, self.weight = hidden.to(options.dtype), weight.to(options.dtype)
        self.bias = None if bias is None else bias.to(options.dtype)
        num_labels, num_tokens = len(hidden), len(weight)

        def buffer(*shape: int, dtype: torch.dtype = options.logits_dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=hidden.device)

        self.nll = buffer(num_labels)
        self.correct = buffer(num_labels, dtype=torch.bool)
        self.entropy = buffer(num_labels) if options.with_entropy else None

        chunk = (options.num_chunk_rows, num_tokens)
        self.logits = buffer(*chunk)
        self.products = self.logits if options.dtype == options.logits_dtype else buffer(*chunk, dtype=options.dtype)
        self.probabilities = buffer(*chunk) if options.with_entropy else self.logits
        self.slopes = buffer(*chunk) if options.softcap is not None and any(needed) else None

        self.grad_hidden = buffer(*hidden.shape, dtype=options.dtype) if needed[0] else None
        self.grad_weight = buffer(*weight.shape).zero_() if needed[1] else None
        self.grad_bias = buffer(num_tokens).zero_() if needed[2] else None
        self.unit = _gradient_unit(loss_weights, options.dtype)
        # The factor of each row's gradients by the logits before they were scaled, hence the scale.
        self.row_factors = (loss_weights * self.unit * options.scale).to(options.logits_dtype).unsqueeze(-1)

    def add_chunk(self, rows: slice, labels: Tensor) -> None:
        labels = labels[rows].unsqueeze(-1)
        logits, slopes = self._logits(self.hidden[rows])
        top = _first_argmax(logits).unsqueeze(-1)
        top_logits, label_logits = logits.gather(-1, top), logits.gather(-1, labels)
        if self.entropy is not None:
            logits.sub_(top_logits)
        probabilities = torch.softmax(logits, dim=-1, out=self.probabilities[: len(labels)])
        # The probability of the most likely token is never small, so its logarithm is exact even if the label's
        # probability underflows.
        top_nll = -probabilities.gather(-1, top).log()
        nll = top_logits - label_logits + top_nll
        self.nll[rows] = nll.squeeze(-1)
        self.correct[rows] = (top == labels).squeeze(-1)
        if self.entropy is not None:
            # 0 * -inf is NaN; 0 times the smallest finite number is the 0 that p log p tends to.
            logits.clamp_(min=torch.finfo(logits.dtype).min).mul_(probabilities)
            self.entropy[rows] = top_nll.squeeze(-1) - logits.sum(-1)
        if self.grad_hidden is not None or self.grad_weight is not None or self.grad_bias is not None:
            # Probability minus one at the label, without the cancellation.
            probabilities.scatter_(-1, labels, torch.expm1(-nll))
            self._add_gradients(rows, probabilities, slopes)

    def _logits(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns a chunk's final logits, and with a softcap their derivative by the logits before it."""
        products, logits = self.products[: len(hidden)], self.logits[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.T, out=products)
        else:
            torch.addmm(self.bias, hidden, self.weight.T, out=products)
        if products is not logits:
            logits.copy_(products)
        softcap, slopes = self.options.softcap, None
        factor = self.options.scale if softcap is None else self.options.scale / softcap
        if factor != 1.0:
            logits.mul_(factor)
        if softcap is None:
            return logits, None
        logits.tanh_()
        if self.slopes is not None:
            slopes = torch.mul(logits, logits, out=self.slopes[: len(hidden)]).neg_().add_(1.0)
        return logits.mul_(softcap), slopes

    def _add_gradients(self, rows: slice, gradient: Tensor, slopes: Tensor | None) -> None:
        """Adds a chunk's gradients, given the derivatives of its nll by the final logits, which it overwrites."""
        if slopes is not None:
            gradient.mul_(slopes)
        gradient.mul_(self.row_factors[rows])
        if self.grad_bias is not None:
            self.grad_bias += gradient.sum(0)
        if gradient.dtype != self.options.dtype:
            gradient = self.products[: len(gradient)].copy_(gradient)
        if self.grad_hidden is not None:
            torch.mm(gradient, self.weight, out=self.grad_hidden[rows])
        if self.grad_weight is not None:
            _add_product(self.grad_weight, gradient.T, self.hidden[rows])


def _first_argmax(logits: Tensor) -> Tensor:
    """Returns ``logits.argmax(-1)``, shape [m]. Several times faster on a CPU, where argmax is not vectorized."""
    num_rows, num_tokens = logits.shape
    if num_tokens % _BLOCK:
        return logits.argmax(-1)
    blocks = logits.view(num_rows, -1, _BLOCK)
    block = blocks.amax(-1).argmax(-1)
    row = torch.arange(num_rows, device=logits.device)
    return block * _BLOCK + blocks[row, block].argmax(-1)


def _gradient_unit(loss_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the factor of the gradients until backward: 1 except in float16, whose range is too narrow for 1 / n.

    A loss scaler does not help here, because its factor arrives only in backward.
    """
    if dtype != torch.float16:
        return torch.ones((), dtype=loss_weights.dtype, device=loss_weights.device)
    return _FLOAT16_LARGEST_WEIGHT / loss_weights.abs().max().clamp(min=2.0**-100)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds ``left @ right`` to ``total`` of shape [V, D], whose dtype may be wider."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        # float16 would overflow if many rows share a label; bfloat16 rounds each chunk's share once, like one pass.
        dtype = total.dtype if left.dtype == torch.float16 else left.dtype
        right = right.to(dtype)
        num_rows = max(1, _PARTIAL_ELEMENTS // total.shape[1])
        for part, factor in zip(total.split(num_rows), left.split(num_rows), strict=True):
            part += factor.to(dtype) @ right
