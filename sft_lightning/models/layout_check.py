"""Check before training that a loaded model gives the same loss and gradient in a layout as on single rows.

The check finds models that look across the rows of a packed micro-batch (state-space and linear-attention models,
attention that depends on a mask alone) and models that process their logits in an unknown way.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sft_lightning.data.batch import Example, Layout
from sft_lightning.data.batching.collate import collate
from sft_lightning.data.batching.prefix_trie import MIN_SHARED_TOKENS
from sft_lightning.distributed.fsdp import gradient_norm, gradients_of
from sft_lightning.errors import UserError
from sft_lightning.losses.base import LabelLosses
from sft_lightning.losses.functional import token_nll
from sft_lightning.losses.model_hooks import label_losses, makes_logits_in_chunks, use_the_models_own_logits
from sft_lightning.models.attention.selection import needs_half_precision
from sft_lightning.system.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

LayoutChoice: TypeAlias = Literal["auto", "padded", "packed", "shared_prefix"]

# The types that transformers' models give their attention layers; other layers carry a state along the row. Its effect
# may be small on tiny examples of random tokens, so these models are refused without a trial.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_NUM_COMMON = MIN_SHARED_TOKENS + 8
# Of the tiny examples: shared prompt tokens, other prompt tokens, response tokens.
_TINY_LENGTHS = ((_NUM_COMMON, 1, 9), (_NUM_COMMON, 1, 5), (0, 1, 5))
_FROM_BEST: tuple[Layout, ...] = ("shared_prefix", "packed", "padded")


@dataclass(frozen=True, slots=True)
class _Comparison:
    """How much losses or a gradient norm may differ, relative to their size.

    Attributes:
        tolerance: The highest difference allowed.
        largest: Compares the largest difference of all labels, which shows a leak into a few of them, instead of the
            root mean square. In 16 bits each label of a deep model has an error of one or two percent.
    """

    tolerance: float
    largest: bool

    def difference(self, values: Tensor, reference: Tensor) -> float:
        """Returns the relative difference; infinite where a value is NaN."""
        difference = values - reference
        if self.largest:
            ratio = difference.abs().max() / reference.abs().mean()
        else:
            ratio = difference.norm() / reference.norm()
        return float(ratio.nan_to_num(nan=float("inf")))


_FLOAT32 = _Comparison(tolerance=1e-4, largest=True)
_HALF = _Comparison(tolerance=2e-2, largest=False)


def choose_layout(
    model: "PreTrainedModel",
    choice: LayoutChoice,
    *,
    precision: Callable[[], AbstractContextManager],
    with_gradients: bool = True,
) -> Layout:
    """Returns the layout for a model: ``choice``, or for ``auto`` the best one that does not change loss or gradient.

    Three tiny examples go through the model: its own unmodified forward on each is compared with the padded layout, and
    that with the layouts in question. Weights, gradients, modes and random state do not change.

    Args:
        model: From ``load_model``, on its device.
        choice: A layout, or ``auto``.
        precision: Enters the precision of training. Not used where attention runs in float32 too, which shows more.
        with_gradients: Also compares gradient norms.

    Raises:
        UserError: If ``choice`` is a layout that changes the loss or the gradient.
    """
    unchecked: Layout = "padded" if choice == "auto" else choice
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and limit < max(map(sum, _TINY_LENGTHS)):
        logger.warning("layout: not checked, the model is limited to %d tokens", limit)
        return unchecked
    in_float32 = not needs_half_precision(model) and model.dtype in (torch.float32, torch.float64)
    compared = _FLOAT32 if in_float32 else _HALF
    examples = _tiny_examples(model)
    with_gradients &= choice != "padded" and any(parameter.requires_grad for parameter in model.parameters())
    with _unchanged(model), _full_float32(model.device) if in_float32 else precision():
        own = _own_losses(model, examples)
        if not own.isfinite().all():
            logger.warning("layout: not checked, the model's losses are not finite")
            return unchecked
        padded = _measure(model, "padded", examples, with_gradients=with_gradients)
        if makes_logits_in_chunks(model) and compared.difference(padded[0], own) > compared.tolerance:
            logger.info("loss: from the model's own logits, which it processes in an unknown way")
            use_the_models_own_logits(model)
            padded = _measure(model, "padded", examples, with_gradients=with_gradients)
        if (difference := compared.difference(padded[0], own)) > compared.tolerance:
            text = (
                f"in a padded batch the model gives different losses than on each row alone (relative difference "
                f"{difference:.1e}, allowed {compared.tolerance:.0e})"
            )
            if in_float32:
                raise UserError(f"model.model_path: {text}, so it cannot be trained on batches: take another model")
            logger.warning("layout: %s, which 16-bit precision alone may cause", text)
        for layout in _FROM_BEST if choice == "auto" else (choice,):
            problem = _problem_of(model, layout, examples, padded, compared) if layout != "padded" else None
            if problem is None:
                logger.info("layout: %s", layout)
                return layout
            if choice != "auto":
                raise UserError(f"data.layout '{layout}' does not suit this model: {problem}; use auto or padded")
            logger.warning("layout: not %s, %s", layout, problem)
    raise AssertionError("padded has no problem")


def _problem_of(
    model: "PreTrainedModel",
    layout: Layout,
    examples: list[Example],
    padded: tuple[Tensor, Tensor | None],
    compared: _Comparison,
) -> str | None:
    """Returns why a layout does not suit the model, None if it does."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) or kinds - _ATTENTION_LAYERS:
        return "the model carries a state along the row, from one example into the next"
    if getattr(config, "attention_chunk_size", None):
        return "the model attends in chunks of the row, which attention over segments does not know"
    try:
        losses, norm = _measure(model, layout, examples, with_gradients=padded[1] is not None)
    except Exception as error:  # a model may raise anything on arguments it was not written for
        if is_out_of_memory(error):
            raise
        return f"the model cannot compute it ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    allowed = f"(allowed {compared.tolerance:.0e})"
    if (difference := compared.difference(losses, padded[0])) > compared.tolerance:
        return f"its losses differ from those of padded rows by {difference:.1e} {allowed}"
    if norm is None or padded[1] is None:
        return None
    if (difference := compared.difference(norm, padded[1])) > compared.tolerance:
        return f"its gradient norm differs from that of padded rows by {difference:.1e} {allowed}"
    return None


def _tiny_examples(model: "PreTrainedModel") -> list[Example]:
    """Returns two rows that share most of their prompts and one that shares nothing, of random tokens.

    What leaks from the previous row may fade within a few tokens, as a state or a short convolution does: labels are
    close to the position where a row begins in the packed layouts.
    """
    vocabulary_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    tokens = np.random.default_rng(0).integers(0, vocabulary_size, (4, _NUM_COMMON)).astype(np.int32)
    common, *rest = tokens
    return [
        Example.from_prompt(
            np.concatenate([common[:num_shared], own[: num_own + num_labels]]),
            num_shared + num_own,
            f"example {number}",
        )
        for number, ((num_shared, num_own, num_labels), own) in enumerate(zip(_TINY_LENGTHS, rest, strict=True))
    ]


def _own_losses(model: "PreTrainedModel", examples: list[Example]) -> Tensor:
    """Returns each label's loss by the model's unmodified forward, a sequence at a time. Shape [M], float32."""
    losses = []
    with torch.no_grad():
        for tokens, label_spans in (sequence for example in examples for sequence in example.sequences):
            ids = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
            logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
            losses += [token_nll(logits[start - 1 : end - 1], ids[start:end]) for start, end, _ in label_spans]
    return torch.cat(losses)


def _measure(
    model: "PreTrainedModel", layout: Layout, examples: list[Example], *, with_gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns each label's loss, shape [M], and the norm of the gradient of their mean."""
    weights = np.full(len(examples), 1.0 / sum(example.num_labels for example in examples))
    batch = collate(examples, weights, layout=layout, pad_token_id=0).to(model.device)
    if not with_gradients:
        with torch.no_grad():
            return label_losses(model, batch).nll, None
    measured: list[LabelLosses] = []

    def loss() -> Tensor:
        measured.append(label_losses(model, batch))
        return measured[0].weighted_sum

    with torch.enable_grad():
        norm = gradient_norm(gradients_of(model, loss))
    return measured[0].nll, norm


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Turns off autocast and TF32, whose 10 bits would show as differences between layouts."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def _unchanged(model: "PreTrainedModel") -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
