"""The loss at label positions, computed inside the model's own forward at the place of its output embedding.

The model is called once, as a whole, so that whatever wraps it or its layers (DDP, FSDP2, compile, PEFT) sees an
ordinary call. Hooks on the output embedding take the hidden states at label positions and compute logits, losses and
gradients chunk by chunk; the embedding itself is run on no position at all.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sft_lightning.data.batch import MicroBatch
from sft_lightning.losses.functional import compute_entropy, token_nll
from sft_lightning.losses.linear_cross_entropy import LabelLosses, linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class _LabelLoss:
    """The hooks of one model.

    Attributes:
        chunked: Whether logits are made chunk by chunk. Otherwise the model makes those of all label positions at once,
            with whatever it does to them afterwards.
    """

    def __init__(self, head: nn.Module | None, config: "PretrainedConfig") -> None:
        self._head = head
        self.chunked = type(head) is nn.Linear
        self._scale, self._softcap = _logit_processing(config)
        self._batch: MicroBatch | None = None
        self._at_head = False
        self._with_entropy = False
        self._hidden: Tensor | None = None
        self._losses: LabelLosses | None = None

    def before_model(
        self, module: "PreTrainedModel", args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        self._batch = kwargs.pop("score_labels_of", None)
        # An adapter may have been put around the head since: then it makes all logits, and labels are picked from them.
        self._at_head = self._batch is not None and module.get_output_embeddings() is self._head
        self._with_entropy = kwargs.pop("with_entropy", False)
        self._hidden = self._losses = None
        return args, kwargs

    def before_head(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._batch is None or not self._at_head:
            return None
        self._hidden = args[0].flatten(0, 1)[self._batch.label_positions]
        seen_by_head = args[0][:1, :0] if self.chunked else self._hidden.unsqueeze(0)
        return (seen_by_head, *args[1:])

    def after_head(self, module: nn.Linear, args: tuple[Tensor, ...], logits: Tensor) -> None:
        if self._batch is None or self._hidden is None or not self.chunked:
            return
        self._losses = linear_cross_entropy(
            self._hidden,
            module.weight,
            module.bias,
            self._batch.labels,
            self._batch.loss_weights,
            scale=self._scale,
            softcap=self._softcap,
            with_entropy=self._with_entropy,
        )
        self._hidden = None

    def after_model(self, module: nn.Module, args: tuple, output: Any) -> Any:
        batch, self._batch = self._batch, None
        losses, self._losses = self._losses, None
        hidden, self._hidden = self._hidden, None
        if batch is None or output is None or losses is not None:
            return output if losses is None else losses
        logits = output.logits.flatten(0, 1)
        if hidden is None:
            # A model that does not call its output embedding as a module.
            logits = logits[batch.label_positions]
        return _losses_of_logits(logits, batch, with_entropy=self._with_entropy)


def install_label_loss(model: "PreTrainedModel") -> None:
    """Teaches ``model.forward`` the keywords of :func:`label_losses`. Adds hooks: weights, names and config stay."""
    head = model.get_output_embeddings()
    hooks = _LabelLoss(head, model.config)
    model.register_forward_pre_hook(hooks.before_model, with_kwargs=True)
    model.register_forward_hook(hooks.after_model, always_call=True)
    if head is not None:
        head.register_forward_pre_hook(hooks.before_head)
        head.register_forward_hook(hooks.after_head)
    object.__setattr__(model, "_sft_label_loss", hooks)


def use_the_models_own_logits(model: "PreTrainedModel") -> None:
    """Makes :func:`label_losses` compute the logits of all label positions at once, by the model's own code."""
    model._sft_label_loss.chunked = False  # type: ignore[union-attr]


def makes_logits_in_chunks(model: "PreTrainedModel") -> bool:
    """Returns whether logits are made chunk by chunk."""
    return model._sft_label_loss.chunked  # type: ignore[union-attr, return-value]


def label_losses(model: "PreTrainedModel", batch: MicroBatch, *, with_entropy: bool = False) -> LabelLosses:
    """Returns the losses of a batch's labels: their weighted sum with gradient, and each of them without.

    Args:
        model: From ``load_model``.
        batch: In any layout that the model supports.
        with_entropy: Also computes the entropy at each label position.
    """
    # Padded rows need no mask: padding is on the right, where causal attention does not look.
    layout: dict[str, Any] = {"attention_mask": None}
    if batch.segments is None and (model.config._attn_implementation or "").startswith("sft_"):
        # Without a mask, transformers reads the position ids on the host in every forward, to find packed rows. Our
        # implementations recognize this one, a single expanded element, without reading it, and attend without it.
        mask = torch.ones((1, 1), dtype=torch.bool, device=batch.input_ids.device)
        layout = {"attention_mask": mask.expand(batch.input_ids.shape)}
    if batch.segments is not None:
        # transformers hands on a mask of four dimensions as it is, where it would otherwise build one of T x T from the
        # position ids. Our attention goes by the segments and reads no mask.
        mask = torch.zeros((1, 1, 1, 1), device=batch.input_ids.device)
        layout = {"attention_mask": mask, "position_ids": batch.position_ids, "segments": batch.segments}
    return model(input_ids=batch.input_ids, use_cache=False, score_labels_of=batch, with_entropy=with_entropy, **layout)


def _logit_processing(config: "PretrainedConfig") -> tuple[float | None, float | None]:
    """Returns (factor, soft cap) that the model applies to its logits, by the names that transformers' models use."""
    text_config = config.get_text_config()
    scale = getattr(text_config, "logit_scale", None)  # Cohere
    divisor = getattr(text_config, "logits_scaling", None)  # Granite
    softcap = getattr(text_config, "final_logit_softcapping", None)  # Gemma 2
    return (scale if divisor is None else 1.0 / divisor), softcap


def _losses_of_logits(logits: Tensor, batch: MicroBatch, *, with_entropy: bool) -> LabelLosses:
    nll = token_nll(logits, batch.labels)
    entropy = None
    if with_entropy:
        with torch.no_grad():
            entropy = compute_entropy(logits)
    return LabelLosses(
        weighted_sum=(batch.loss_weights.to(nll.dtype) * nll).sum(),
        nll=nll.detach(),
        correct=logits.argmax(-1) == batch.labels,
        entropy=entropy,
    )
