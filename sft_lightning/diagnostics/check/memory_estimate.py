"""Estimate the memory of a training step from ``config.json`` and the largest micro-batch.

Symbols: P positions of the micro-batch (B x T padded, T packed), M labels, V vocabulary, D hidden size, A query heads x
head size, K key/value heads x head size, I inner size of the feed-forward layer times the experts per token, N
parameters; w bytes of a parameter, c bytes of a computed number (2 in the 16-bit precisions).

    weights       w N
    gradients     w N, at the same time as the activations if gradients are accumulated
    optimizer     2 w N, AdamW's two averages in the parameters' dtype
    16-bit copies 2 N without the input embedding, under autocast: a layer keeps them for its backward pass
    activations   P x (layers x per layer + 8 D for the last norm) + 3 c I P during the backward pass of a layer
      per layer   n times the width of its norms + c (2 D + 2 A + 2 K + 4 I): a norm keeps its input and its normalized
                  input in float32 (n = 8; 6 if parameters have 16 bits); matrix products keep their input, one for
                  query, key and value together and one for gate and up (under autocast one each: 5 D); attention keeps
                  its query, key, value and output; the feed-forward layer keeps gate, its activation, up and their
                  product
      checkpointed  the input of each layer, and everything of one layer at a time
    loss          R V x (4 + c below float32 + 4 with entropy) for the R labels whose logits exist at a time, 4 V D for
                  the weight's gradient before it is added, 2 V D for a 16-bit copy of the weight, M D x (w + c)

The kept tensors are those of transformers' Llama and Qwen2 layers with PyTorch's attention, counted with
``saved_tensors_hooks``. The formula follows Korthikanti et al. (https://arxiv.org/abs/2205.05198, section 4.1) without
dropout, with gated feed-forward layers and with attention that keeps no matrix of scores. The loss is
``linear_cross_entropy``. The estimate is for one replica that holds everything: under FSDP, weights, gradients and
optimizer are divided by the number of devices. A tenth of the device is reserved for CUDA itself and fragmentation.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft_lightning.diagnostics.check.findings import Finding
from sft_lightning.diagnostics.check.layout_statistics import LargestMicroBatch
from sft_lightning.losses.chunking import budget_bytes, num_chunk_rows
from sft_lightning.models.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FREE_SHARE = 0.1
# Inputs of matrix products per layer, in units of D: products share a tensor, but under autocast each has a copy.
_PRODUCT_INPUTS, _PRODUCT_INPUTS_AUTOCAST = 2, 5


@dataclass(frozen=True, slots=True)
class Device:
    """The device that the run must fit on."""

    name: str
    memory_bytes: int
    is_cuda: bool
    is_known: bool  # False for the memory of this machine if the run may take place on another


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model that the formula uses, as in the module's docstring."""

    num_parameters: int
    num_input_embeddings: int
    vocabulary_size: int
    hidden_size: int
    num_layers: int
    norm_size: int  # of all norms of a layer
    query_size: int
    key_size: int
    inner_size: int
    max_positions: int | None

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "ModelShape | None":
        """Returns the shape of a decoder of attention and feed-forward layers; None if its sizes have other names.

        Args:
            model: May be on the meta device.
        """
        config = model.config.get_text_config()
        sizes = [getattr(config, name, 0) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")]
        head = model.get_output_embeddings()
        if head is None or not all(isinstance(size, int) and size > 0 for size in sizes):
            return None
        hidden, layers, heads = sizes
        head_size = getattr(config, "head_dim", None) or hidden // heads
        expert = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
        inner = (expert or 4 * hidden) * (getattr(config, "num_experts_per_tok", None) or 1)
        parameters = {id(parameter): parameter for parameter in model.parameters()}
        embedding: Any = model.get_input_embeddings()
        is_tied = embedding.weight is head.weight or getattr(config, "tie_word_embeddings", False)
        num_embeddings = embedding.weight.numel()
        query_size, key_size = heads * head_size, (getattr(config, "num_key_value_heads", None) or heads) * head_size
        norm_sizes = [
            next((parameter.numel() for parameter in module.parameters(recurse=False)), 0)
            for module in model.modules()
            if "Norm" in type(module).__name__
        ]
        # One norm follows the last layer. Norms of a head's width are applied to all heads of queries, or of keys.
        norm_size = hidden * max(1, (norm_sizes.count(hidden) - 1) // layers)
        if head_size != hidden:
            norm_size += norm_sizes.count(head_size) // layers * (query_size + key_size) // 2
        total = sum(parameter.numel() for parameter in parameters.values())
        if is_tied and embedding.weight is not head.weight:
            total -= num_embeddings  # two tensors on the meta device, one in a loaded model
        return cls(
            num_parameters=total,
            num_input_embeddings=num_embeddings,
            vocabulary_size=head.weight.shape[0],
            hidden_size=hidden,
            num_layers=layers,
            norm_size=norm_size,
            query_size=query_size,
            key_size=key_size,
            inner_size=inner,
            max_positions=getattr(config, "max_position_embeddings", None),
        )


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """The memory of a training step by part, and the largest micro-batch that fits.

    Attributes:
        parts: Name -> bytes.
        num_positions: Positions of the micro-batch that the estimate is for.
        num_fitting_positions: The most positions of a micro-batch that fits; 0 if not even the model fits.
    """

    parts: dict[str, int]
    num_parameters: int
    num_positions: int
    num_fitting_positions: int
    device: Device

    @property
    def total_bytes(self) -> int:
        """The sum of all parts."""
        return sum(self.parts.values())

    @property
    def state_bytes(self) -> int:
        """The bytes that do not depend on the micro-batch."""
        return sum(self.parts[name] for name in ("weights", "gradients", "optimizer"))

    def as_dict(self) -> dict[str, Any]:
        """Returns the estimate as it is written to JSON."""
        return {
            "num_parameters": self.num_parameters,
            "bytes": {**self.parts, "total": self.total_bytes},
            "micro_batch_positions": self.num_positions,
            "fitting_micro_batch_positions": self.num_fitting_positions,
            "device": self.device.name,
            "device_bytes": self.device.memory_bytes,
        }


def estimate_memory(
    shape: ModelShape,
    largest: LargestMicroBatch,
    *,
    precision: Precision,
    device: Device,
    packed: bool,
    with_entropy: bool,
    gradient_checkpointing: bool,
) -> MemoryEstimate:
    """Returns the memory of a training step by the formula in the module's docstring.

    Args:
        shape: Sizes of the model.
        largest: The micro-batch with the most positions.
        precision: Precision of training.
        device: The device of the training.
        packed: Whether rows are packed: attention on a CPU then computes in float32.
        with_entropy: ``model.log_token_statistics``.
        gradient_checkpointing: ``model.gradient_checkpointing``.
    """
    size, compute = precision.parameter_dtype.itemsize, precision.matmul_dtype.itemsize
    layer = activation_bytes_per_layer(shape, precision, float32_attention=packed and not device.is_cuda)
    per_position = shape.num_layers * layer
    if gradient_checkpointing:
        per_position = shape.num_layers * size * shape.hidden_size + layer
    per_position += 8 * shape.hidden_size + 3 * compute * shape.inner_size
    labels = max(1, largest.num_labels)
    parts = {
        "weights": size * shape.num_parameters,
        "gradients": size * shape.num_parameters,
        "optimizer": 2 * size * shape.num_parameters,
        "16-bit copies": 2 * (shape.num_parameters - shape.num_input_embeddings) if precision.autocast_dtype else 0,
        "activations": per_position * largest.num_positions,
        "loss": _loss_bytes(shape, labels, precision=precision, device=device, with_entropy=with_entropy),
    }
    fixed = sum(parts.values()) - parts["activations"]
    available = int((1 - _FREE_SHARE) * device.memory_bytes) - fixed
    return MemoryEstimate(parts, shape.num_parameters, largest.num_positions, max(0, available // per_position), device)


def activation_bytes_per_layer(shape: ModelShape, precision: Precision, *, float32_attention: bool = False) -> int:
    """Returns the bytes that a layer keeps per position for its backward pass."""
    hidden, compute = shape.hidden_size, precision.matmul_dtype.itemsize
    norm = 6 if precision.parameter_dtype.itemsize == 2 else 2 * max(4, compute)
    inputs = _PRODUCT_INPUTS_AUTOCAST if precision.autocast_dtype else _PRODUCT_INPUTS
    attention = 2 * shape.query_size + 2 * shape.key_size
    attention_bytes = compute * attention
    if float32_attention and precision.is_16_bit:
        attention_bytes = 4 * attention + compute * shape.query_size  # and the input of the output projection
    return norm * shape.norm_size + compute * (inputs * hidden + 4 * shape.inner_size) + attention_bytes


def check_memory(estimate: MemoryEstimate) -> list[Finding]:
    """Returns a finding if the step does not fit on the device."""
    device, total = estimate.device, estimate.total_bytes
    if total <= (1 - _FREE_SHARE) * device.memory_bytes:
        return []
    never = estimate.num_fitting_positions == 0
    message = f"memory: a step takes about {in_gib(total)}, {device.name} has {in_gib(device.memory_bytes)}"
    if not device.is_known:
        message += " (another device: --memory_gib N)"
    fix = "use a smaller data.batch_size or data.max_length, or model.gradient_checkpointing: true"
    if never:
        fix = "trainer.precision bf16-true takes half; else use a larger device, or FSDP over several"
    return [Finding("memory", "error" if never and device.is_known else "warning", message, fix)]


def check_positions(shape: ModelShape, longest_tokens: int) -> list[Finding]:
    """Returns a finding if rows are longer than the model's position limit."""
    if shape.max_positions is None or longest_tokens <= shape.max_positions:
        return []
    message = f"train: the longest row has {longest_tokens:,} tokens, the model knows {shape.max_positions:,} positions"
    return [Finding("positions", "warning", message, f"data.max_length {shape.max_positions} drops what is longer")]


def in_gib(num_bytes: int) -> str:
    """Returns bytes as text in GiB, or in MiB below 1 GiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _loss_bytes(shape: ModelShape, num_labels: int, *, precision: Precision, device: Device, with_entropy: bool) -> int:
    compute, parameter = precision.matmul_dtype.itemsize, precision.parameter_dtype.itemsize
    wide = max(4, compute)
    vocabulary, hidden = shape.vocabulary_size, shape.hidden_size
    rows = num_chunk_rows(
        num_labels,
        vocabulary * wide,
        budget_bytes=budget_bytes(device.memory_bytes if device.is_cuda else 0),
        on_cpu=not device.is_cuda,
    )
    per_logit = wide * (1 + with_entropy) + (compute if compute < wide else 0)
    weight = vocabulary * hidden * (wide + (compute if precision.autocast_dtype else 0))
    return rows * vocabulary * per_logit + weight + num_labels * hidden * (parameter + compute)
