"""Register attention over packed rows with transformers.

A model loaded with one of these implementations takes a packed row and its ``segments`` as forward keyword arguments.
Without segments, the same implementation is transformers' own attention and mask for that model, so validation and
generation need no switching.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sft_lightning.data.batch import Segments
from sft_lightning.models.attention import segments as segment_attention
from sft_lightning.models.attention.kernels import CUDA_KERNELS, NOT_IN_KERNEL, attend_by_kernel
from sft_lightning.system.sdpa import without_cudnn_attention

# Arguments of a model's attention that change its result and that nothing here computes.
_REFUSED = {"s_aux": "attention sinks", "position_bias": "a position bias", "cache": "a paged cache"}


def registered_name(kernel: str, without_segments: str) -> str:
    """Returns the name under which transformers knows an implementation.

    Args:
        kernel: Computes attention over segments: ``segments`` or one of ``CUDA_KERNELS``.
        without_segments: Transformers' own attention where there are no segments: ``sdpa`` or ``eager``.
    """
    # transformers treats a name that contains "flash" or "sdpa" as one of its own functions.
    short = kernel.replace("flash_attention_", "fa")
    return f"sft_{short}" if without_segments == "sdpa" else f"sft_{short}_{without_segments}"


class RegisteredAttention:
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
            attend = self._transformers_attention(module)
            with without_cudnn_attention(is_cuda=query.is_cuda):
                return attend(module, query, key, value, attention_mask, *args, **kwargs)
        refused = [text for name, text in _REFUSED.items() if kwargs.get(name) is not None]
        refused += [text for name, text in NOT_IN_KERNEL.get(self.kernel, {}).items() if kwargs.get(name)]
        if refused or args or not getattr(module, "is_causal", True):
            raise NotImplementedError(f"packed rows have no {' and no '.join(refused) or 'bidirectional attention'}")
        if "sliding_window" not in kwargs and getattr(getattr(module, "config", None), "sliding_window", None):
            # Such a model applies its window in the mask alone. The layout check's short rows would not show it.
            raise NotImplementedError("packed rows have no mask, and the model applies its sliding window only there")
        scale = kwargs.get("scaling")
        options = {
            "scale": query.shape[-1] ** -0.5 if scale is None else float(scale),
            "dropout": kwargs.get("dropout", 0.0),
            "window_tokens": kwargs.get("sliding_window"),
            "softcap": kwargs.get("softcap"),
        }
        if self.kernel == "segments":
            with without_cudnn_attention(is_cuda=query.is_cuda):
                return segment_attention.attend(query, key, value, segments, **options).transpose(1, 2), None
        return attend_by_kernel(self.kernel, query, key, value, segments, **options), None

    def _transformers_attention(self, module: nn.Module) -> Callable[..., Any]:
        if self._without_segments == "sdpa":
            return ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sys.modules[type(module).__module__].eager_attention_forward


def _ignoring_full_masks(make_mask: Callable[..., Any]) -> Callable[..., Any]:
    """Returns transformers' mask function without its look at a padding mask that hides nothing.

    Such a mask comes from ``label_losses``: one element expanded to [B, T], which its strides show. Whether a mask of
    another kind hides nothing is in the values, and reading them makes the host wait for the device.
    """

    def mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.ndim == 2 and _is_one_element(attention_mask):
            attention_mask = None
        return make_mask(*args, attention_mask=attention_mask, **kwargs)

    return mask


def _is_one_element(mask: Tensor) -> bool:
    return all(size == 1 or stride == 0 for size, stride in zip(mask.shape, mask.stride(), strict=True))


def _register() -> None:
    for without_segments in ("sdpa", "eager"):
        for kernel in ("segments", *CUDA_KERNELS):
            name = registered_name(kernel, without_segments)
            AttentionInterface.register(name, RegisteredAttention(kernel, without_segments))
            AttentionMaskInterface.register(name, _ignoring_full_masks(ALL_MASK_ATTENTION_FUNCTIONS[without_segments]))


_register()
