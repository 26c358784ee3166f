"""Attention over packed rows, registered with transformers: which implementation a model gets, and the CUDA kernels.

A model loaded with one of these implementations takes a packed row and its ``segments`` as forward keyword arguments.
Without segments, the same implementation is transformers' own attention and mask for that model, so validation and
generation need no switching.
"""

import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sft_lightning.data.batch import Segments
from sft_lightning.errors import UserError
from sft_lightning.models.attention import segments as segment_attention

logger = logging.getLogger(__name__)

AttentionChoice = Literal["auto", "flash_attention_2", "flash_attention_3", "varlen", "sdpa", "eager"]

_FA3_SOURCE = "git+https://github.com/Dao-AILab/flash-attention.git#subdirectory=hopper"
_INSTALL = {
    "flash_attention_2": ("flash_attn", "flash-attn", "pip install 'sft-lightning[flash-attn]' --no-build-isolation"),
    "flash_attention_3": (
        "flash_attn_interface",
        "flash-attn-3",
        f"pip install '{_FA3_SOURCE}' --no-build-isolation",
    ),
}
# The best first.
_CUDA_KERNELS = ("flash_attention_3", "flash_attention_2", "varlen")
_LARGEST_HEAD = 256
# What a kernel leaves out, by the name of the argument with which a model's attention asks for it.
_NOT_IN_KERNEL = {
    "flash_attention_3": {"dropout": "dropout"},
    "flash_attention_2": {},
    "varlen": {"dropout": "dropout", "softcap": "soft-capping"},
}
# Arguments of a model's attention that change its result and that nobody here computes.
_REFUSED = {"s_aux": "attention sinks", "position_bias": "a position bias", "cache": "a paged cache"}


def choose_attention(
    config: PretrainedConfig, choice: AttentionChoice, *, device_type: str, half_precision: bool
) -> str:
    """Returns the attention implementation by the name that transformers knows it by.

    ``auto`` takes the first of FlashAttention 3, FlashAttention 2 and torch's varlen attention that is installed and
    can run (CUDA, 16-bit precision), else what plain torch does over segments (``sdpa``). It says in one line which and
    why.

    A model that does not look its attention up in transformers' interface keeps transformers' own.

    Raises:
        UserError: If an implementation is asked for by name and cannot run here.
    """
    without_segments = "sdpa" if choice != "eager" and _supports(config, "sdpa") else "eager"
    if choice == "auto":
        obstacles = {
            kernel: _obstacle(kernel, config, device_type=device_type, half_precision=half_precision)
            for kernel in _CUDA_KERNELS
        }
        possible = [kernel for kernel, obstacle in obstacles.items() if obstacle is None]
        taken = possible[0] if possible else without_segments
        obstacle = obstacles["flash_attention_2"] if device_type == "cuda" else "no CUDA device"
        reason = "the best that runs here" if possible else f"no FlashAttention: {obstacle}"
        logger.info("attention: %s (%s)", taken, reason)
    else:
        taken = choice
        if choice in _CUDA_KERNELS:
            obstacle = _obstacle(choice, config, device_type=device_type, half_precision=half_precision)
            if obstacle is not None:
                raise UserError(f"model.attn_implementation '{choice}' cannot run here: {obstacle}; use auto or sdpa")
        elif choice == "sdpa" and without_segments == "eager":
            raise UserError("model.attn_implementation 'sdpa' is not supported by this model; use auto or eager")
    if not _supports(config, "attention_backend"):
        return without_segments
    kernel = taken if taken in _CUDA_KERNELS else "segments"
    return _registered_name(kernel, without_segments)


def needs_half_precision(model: PreTrainedModel) -> bool:
    """Returns whether the model's attention over packed rows runs in 16-bit precision only."""
    function = AttentionInterface().get(model.config._attn_implementation)
    return isinstance(function, _Attention) and function.kernel in _CUDA_KERNELS


def _obstacle(kernel: str, config: PretrainedConfig, *, device_type: str, half_precision: bool) -> str | None:
    """Returns what keeps a CUDA kernel from running a model here, None if nothing does."""
    unsuited = _unsuited(kernel, config, device_type=device_type, half_precision=half_precision)
    missing = None
    if kernel in _INSTALL:
        module, package, command = _INSTALL[kernel]
        if importlib.util.find_spec(module) is None:
            missing = f"the package {package} is not installed: {command}"
    return ", and ".join(text for text in (unsuited, missing) if text) or None


def _unsuited(kernel: str, config: PretrainedConfig, *, device_type: str, half_precision: bool) -> str | None:
    """Returns what would keep a kernel from running a model here if it were installed."""
    if not _supports(config, "attention_backend"):
        return "the model has an attention of its own"
    text_config = config.get_text_config()
    if device_type != "cuda":
        return "it needs a CUDA device"
    if not half_precision:
        return "it needs 16-bit precision such as trainer.precision bf16-mixed"
    capability = torch.cuda.get_device_capability()
    # FlashAttention 3 is written for Hopper, and no other chip.
    if capability < (8, 0) or (kernel == "flash_attention_3" and capability[0] != 9):
        return f"it does not run on {torch.cuda.get_device_name()}"
    head_size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    if head_size > _LARGEST_HEAD or head_size % 8:
        return f"the model's heads have {head_size} dimensions, it takes multiples of 8 up to {_LARGEST_HEAD}"
    if getattr(text_config, "v_head_dim", head_size) != head_size:
        return "the model's values have another size than its keys"
    if kernel == "varlen" and not _takes_grouped_heads():
        return f"that of torch {torch.__version__} takes no grouped heads"
    asked_for = {
        "dropout": any(getattr(text_config, name, None) for name in ("attention_dropout", "attn_pdrop")),
        "softcap": getattr(text_config, "attn_logit_softcapping", None),
    }
    lacking = [text for name, text in _NOT_IN_KERNEL[kernel].items() if asked_for[name]]
    return f"it has no {' and no '.join(lacking)}" if lacking else None


def _takes_grouped_heads() -> bool:
    """Returns whether torch's varlen attention is new enough; its signature has grown since it came."""
    from torch.nn.attention import varlen

    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def _supports(config: PretrainedConfig, feature: str) -> bool:
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    return bool(getattr(model_class, f"_supports_{feature}", False))


def _registered_name(kernel: str, without_segments: str) -> str:
    # transformers acts on "flash" and "sdpa" inside a name, as if these were its own functions.
    short = kernel.replace("flash_attention_", "fa")
    return f"sft_{short}" if without_segments == "sdpa" else f"sft_{short}_{without_segments}"


def _attend_by_flash_attention_2(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, window_tokens: int | None, **options: Any
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        *(query, key, value, segments.query_offsets, segments.key_offsets, segments.max_queries, segments.max_keys),
        dropout_p=options["dropout"],
        softmax_scale=options["scale"],
        causal=True,
        window_size=_window(window_tokens),
        softcap=options["softcap"] or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _attend_by_flash_attention_3(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, window_tokens: int | None, **options: Any
) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    output = flash_attn_varlen_func(
        *(query, key, value, segments.query_offsets, segments.key_offsets, segments.max_queries, segments.max_keys),
        softmax_scale=options["scale"],
        causal=True,
        window_size=_window(window_tokens),
        softcap=options["softcap"] or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output[0] if isinstance(output, tuple) else output  # with the log-sum-exp in some of its versions


def _attend_by_varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, window_tokens: int | None, **options: Any
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        *(query, key, value, segments.query_offsets, segments.key_offsets, segments.max_queries, segments.max_keys),
        scale=options["scale"],
        window_size=_window(window_tokens),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output


def _window(window_tokens: int | None) -> tuple[int, int]:
    return (-1 if window_tokens is None else window_tokens - 1, 0)


_VARLEN_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "flash_attention_2": _attend_by_flash_attention_2,
    "flash_attention_3": _attend_by_flash_attention_3,
    "varlen": _attend_by_varlen,
}


class _Attention:
    """An attention function as transformers calls it, with and without segments."""

    def __init__(self, kernel: str, without_segments: str) -> None:
        self.kernel = kernel
        self._without_segments = without_segments

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        segments: Segments | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if segments is None:
            return self._own(module)(module, query, key, value, attention_mask, *args, **kwargs)
        refused = [text for name, text in _REFUSED.items() if kwargs.get(name) is not None]
        refused += [text for name, text in _NOT_IN_KERNEL.get(self.kernel, {}).items() if kwargs.get(name)]
        if refused or args or not getattr(module, "is_causal", True):
            raise NotImplementedError(f"packed rows have no {' and no '.join(refused) or 'bidirectional attention'}")
        if "sliding_window" not in kwargs and getattr(getattr(module, "config", None), "sliding_window", None):
            # Such a model puts its window into the mask alone. Short rows, as the guard's, would not show it.
            raise NotImplementedError("packed rows have no mask, and the model tells its sliding window to that alone")
        scale = kwargs.get("scaling")
        options = {
            "scale": query.shape[-1] ** -0.5 if scale is None else float(scale),
            "dropout": kwargs.get("dropout", 0.0),
            "window_tokens": kwargs.get("sliding_window"),
            "softcap": kwargs.get("softcap"),
        }
        if self.kernel == "segments":
            return segment_attention.attend(query, key, value, segments, **options).transpose(1, 2), None
        return _attend_by_kernel(_VARLEN_FUNCTIONS[self.kernel], query, key, value, segments, options), None

    def _own(self, module: nn.Module) -> Callable[..., Any]:
        if self._without_segments == "sdpa":
            return ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sys.modules[type(module).__module__].eager_attention_forward


@torch.compiler.disable  # the longest segment is a number that differs in every micro-batch
def _attend_by_kernel(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    options: dict[str, Any],
) -> Tensor:
    """Returns shape [1, T, H, E] from a kernel that takes [T, H, E], queries the last of their segment's keys."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    query, key, value = (heads.squeeze(0).transpose(0, 1).to(dtype) for heads in (query, key, value))
    if segments.key_positions is not None:
        # In float32: the gradients of all who share a token are added, and in 16 bits a long sum stops growing.
        key, value = (heads.float().index_select(0, segments.key_positions).to(dtype) for heads in (key, value))
    return function(query.contiguous(), key.contiguous(), value.contiguous(), segments, **options).unsqueeze(0)


def _register() -> None:
    for without_segments in ("sdpa", "eager"):
        for kernel in ("segments", *_CUDA_KERNELS):
            name = _registered_name(kernel, without_segments)
            AttentionInterface.register(name, _Attention(kernel, without_segments))
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[without_segments])


_register()
