"""Compute the loss at label positions inside the model's own forward, instead of its output embedding.

The model is called once, as a whole, so that wrappers of the model or its layers (DDP, FSDP2, compile, PEFT) see an
ordinary call. Hooks on the output embedding take the hidden states at label positions and pass them to the loss, which
computes logits and gradients chunk by chunk; the embedding itself runs on no position at all.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sft_lightning.data.batch import MicroBatch
from sft_lightning.losses.base import LabelLosses, Loss
from sft_lightning.losses.token_loss import TokenLoss

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class _LossHooks:
    """The hooks of one model.

    Attributes:
        chunked: Whether the loss computes logits chunk by chunk. Otherwise the model computes those of all label
            positions at once, with its own processing afterwards.
    """

    def __init__(self, head: nn.Module | None, config: "PretrainedConfig") -> None:
        self._head = head
        self.chunked = type(head) is nn.Linear
        self._scale, self._softcap = _logit_processing(config)
        self._batch: MicroBatch | None = None
        self._at_head = False
        self._loss: Loss = TokenLoss()
        self._with_entropy = False
        self._hidden: Tensor | None = None
        self._losses: LabelLosses | None = None

    def before_model(
        self, module: "PreTrainedModel", args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        self._batch = kwargs.pop("score_labels_of", None)
        # An adapter may wrap the head by now: then it computes all logits, and the labels' logits are selected.
        self._at_head = self._batch is not None and module.get_output_embeddings() is self._head
        self._loss = kwargs.pop("label_loss", self._loss)
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
        self._losses = self._loss.from_hidden(
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
            # The model does not call its output embedding as a module.
            logits = logits[batch.label_positions]
        return self._loss.from_logits(logits, batch.labels, batch.loss_weights, with_entropy=self._with_entropy)


def install_label_loss(model: "PreTrainedModel") -> None:
    """Adds hooks that make ``model.forward`` accept the keywords of :func:`label_losses`. Changes nothing else."""
    head = model.get_output_embeddings()
    hooks = _LossHooks(head, model.config)
    model.register_forward_pre_hook(hooks.before_model, with_kwargs=True)
    model.register_forward_hook(hooks.after_model, always_call=True)
    if head is not None:
        head.register_forward_pre_hook(hooks.before_head)
        head.register_forward_hook(hooks.after_head)
    object.__setattr__(model, "_sft_label_loss", hooks)


def use_the_models_own_logits(model: "PreTrainedModel") -> None:
    """Makes :func:`label_losses` take the logits of all label positions at once from the model's own code."""
    model._sft_label_loss.chunked = False  # type: ignore[union-attr]


def makes_logits_in_chunks(model: "PreTrainedModel") -> bool:
    """Returns whether the loss computes logits chunk by chunk."""
    return model._sft_label_loss.chunked  # type: ignore[union-attr, return-value]


def asks_for_router_loss(model: "PreTrainedModel") -> bool:
    """Returns whether the config asks for the auxiliary loss of a mixture of experts, which is not computed here.

    The loss is a product of two means over the tokens of a forward pass. Over the micro-batches of an optimizer step it
    is therefore no sum, and would depend on how the step is split.
    """
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def label_losses(
    model: "PreTrainedModel", batch: MicroBatch, loss: Loss | None = None, *, with_entropy: bool = False
) -> LabelLosses:
    """Returns the losses of a batch's labels: their weighted sum with gradient, and each of them without.

    Args:
        model: From ``load_model``.
        batch: In any layout that the model supports.
        loss: By default :class:`TokenLoss`.
        with_entropy: Whether to compute the entropy at each label position.
    """
    inputs: dict[str, Any]
    if batch.segments is not None:
        # transformers passes on a mask of four dimensions unchanged, instead of building one of T x T from the position
        # ids. Our attention uses the segments and reads no mask.
        mask = torch.zeros((1, 1, 1, 1), device=batch.input_ids.device)
        inputs = {"attention_mask": mask, "position_ids": batch.position_ids, "segments": batch.segments}
    elif (model.config._attn_implementation or "").startswith("sft_"):
        # Without a mask, transformers reads the position ids on the host in every forward, to find packed rows. Our
        # implementations recognize this one, a single expanded element, without reading it, and attend without it.
        mask = torch.ones((1, 1), dtype=torch.bool, device=batch.input_ids.device)
        inputs = {"attention_mask": mask.expand(batch.input_ids.shape)}
    else:
        # Padded rows need no mask: padding is on the right, where causal attention does not look.
        inputs = {"attention_mask": None}
    if asks_for_router_loss(model):
        inputs["output_router_logits"] = False  # its loss would be computed for nothing, and fails without a mask
    inputs |= {"score_labels_of": batch, "label_loss": loss or TokenLoss(), "with_entropy": with_entropy}
    return model(input_ids=batch.input_ids, use_cache=False, **inputs)


def _logit_processing(config: "PretrainedConfig") -> tuple[float | None, float | None]:
    """Returns (factor, soft cap) that the model applies to its logits, by the names in transformers' configs."""
    text_config = config.get_text_config()
    scale = getattr(text_config, "logit_scale", None)  # Cohere
    divisor = getattr(text_config, "logits_scaling", None)  # Granite
    softcap = getattr(text_config, "final_logit_softcapping", None)  # Gemma 2
    return (scale if divisor is None else 1.0 / divisor), softcap
