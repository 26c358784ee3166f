"""Choose the attention implementation that a model is loaded with."""

import logging
from typing import Any, Literal

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.attention.interface import RegisteredAttention, registered_name
from sft_lightning.models.attention.kernels import CUDA_KERNELS, NOT_IN_KERNEL, import_kernel, try_kernel

logger = logging.getLogger(__name__)

AttentionChoice = Literal["auto", "flash_attention_2", "flash_attention_3", "varlen", "sdpa", "eager"]

_FA3_SOURCE = "git+https://github.com/Dao-AILab/flash-attention.git#subdirectory=hopper"
# Module, package and install command of the kernels that do not come with torch.
_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn", "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": (
        "flash_attn_interface",
        "flash-attn-3",
        f"pip install '{_FA3_SOURCE}' --no-build-isolation",
    ),
}
_MAX_HEAD_SIZE = 256
# Beyond this, FlashAttention 3 runs as for 256, where its backward pass ignores the request to be deterministic.
_MAX_DETERMINISTIC_HEAD_SIZE_OF_FA3 = 192


def choose_attention(
    config: PretrainedConfig, choice: AttentionChoice, *, device_type: str, half_precision: bool
) -> str:
    """Returns the attention implementation by the name under which transformers knows it.

    ``auto`` takes the first of FlashAttention 3, FlashAttention 2 and torch's varlen attention that is installed and
    passes a trial on the device (CUDA, 16-bit precision), else plain torch over segments (``sdpa``). It logs in one
    line which and why.

    A model that does not look its attention up in transformers' interface keeps transformers' own.

    Raises:
        UserError: If an implementation is asked for by name and cannot run here.
    """
    # Without soft-capping: transformers 5.17 runs Gemma 2 on sdpa, which ignores it.
    takes_sdpa = _supports(config, "sdpa") and _softcap(config) is None
    without_segments = "sdpa" if choice != "eager" and takes_sdpa else "eager"
    circumstances = {"device_type": device_type, "half_precision": half_precision}
    kernel: str | None = None
    if choice == "auto":
        kernel, reason = _best_kernel(config, **circumstances)
        logger.info("attention: %s (%s)", kernel or without_segments, reason)
    elif choice in CUDA_KERNELS:
        kernel = choice
        if (obstacle := _obstacle(kernel, config, **circumstances)) is not None:
            raise UserError(f"model.attn_implementation '{choice}' cannot run here: {obstacle}; use auto or sdpa")
    elif choice == "sdpa" and without_segments == "eager":
        raise UserError("model.attn_implementation 'sdpa' is not supported by this model; use auto or eager")
    if not _supports(config, "attention_backend"):
        return without_segments
    return registered_name(kernel or "segments", without_segments)


def needs_half_precision(model: PreTrainedModel) -> bool:
    """Returns whether the model's attention over packed rows runs in 16-bit precision only."""
    function = AttentionInterface().get(model.config._attn_implementation)
    return isinstance(function, RegisteredAttention) and function.kernel in CUDA_KERNELS


def _best_kernel(config: PretrainedConfig, **circumstances: Any) -> tuple[str | None, str]:
    """Returns the first CUDA kernel that runs here, and why it is that one or why there is none."""
    if circumstances["device_type"] != "cuda":
        return None, "no FlashAttention: no CUDA device"
    failures: list[str] = []
    reason = None
    for kernel in CUDA_KERNELS:
        unsuited = _unsuited(kernel, config, **circumstances)
        missing = None if unsuited else _missing(kernel)
        if unsuited is None and missing is None:
            failure = _failure(kernel, config)
            if failure is None:
                return kernel, "; ".join(["the best that runs here", *failures])
            failures.append(f"{kernel}: {failure}")
        # A package that would help is worth naming, and otherwise what rules out torch's own kernel.
        reason = missing or reason or (unsuited if kernel == "varlen" else None)
    return None, "no FlashAttention: " + "; ".join(failures or [str(reason)])


def _obstacle(kernel: str, config: PretrainedConfig, **circumstances: Any) -> str | None:
    """Returns what keeps a CUDA kernel from running a model here, None if nothing does."""
    known = [text for text in (_unsuited(kernel, config, **circumstances), _missing(kernel)) if text]
    return ", and ".join(known) or _failure(kernel, config)


def _unsuited(kernel: str, config: PretrainedConfig, *, device_type: str, half_precision: bool) -> str | None:
    """Returns why a kernel would not run a model here even if it were installed."""
    if not _supports(config, "attention_backend"):
        return "the model implements attention itself"
    text_config = config.get_text_config()
    if device_type != "cuda":
        return "it needs a CUDA device"
    if not half_precision:
        return "it needs 16-bit precision such as trainer.precision bf16-mixed"
    capability = torch.cuda.get_device_capability()
    # FlashAttention 3 is written for Hopper, and no other chip.
    if capability < (8, 0) or (kernel == "flash_attention_3" and capability[0] != 9):
        return f"it does not run on {torch.cuda.get_device_name()}"
    _, _, head_size = _head_shape(config)
    if head_size > _MAX_HEAD_SIZE or head_size % 8:
        return f"the model's heads have {head_size} dimensions, it takes multiples of 8 up to {_MAX_HEAD_SIZE}"
    if getattr(text_config, "v_head_dim", head_size) != head_size:
        return "the model's values have another size than its keys"
    if (
        kernel == "flash_attention_3"
        and head_size > _MAX_DETERMINISTIC_HEAD_SIZE_OF_FA3
        and torch.are_deterministic_algorithms_enabled()
    ):
        return f"it has no deterministic backward for heads of {head_size} dimensions"
    asked_for = {
        "dropout": any(getattr(text_config, name, None) for name in ("attention_dropout", "attn_pdrop")),
        "softcap": _softcap(config),
    }
    lacking = [text for name, text in NOT_IN_KERNEL[kernel].items() if asked_for[name]]
    return f"it has no {' and no '.join(lacking)}" if lacking else None


def _missing(kernel: str) -> str | None:
    """Returns how to install a kernel's package, None if it is installed."""
    if kernel not in _PACKAGES:
        return None
    module, package, command = _PACKAGES[kernel]
    try:
        import_kernel(kernel)
    except ModuleNotFoundError as error:
        if error.name == module:
            return f"the package {package} is not installed: {command}"
    except Exception:  # an installed package that cannot be imported: the trial reports why
        return None
    return None


def _failure(kernel: str, config: PretrainedConfig) -> str | None:
    """Returns the error of a trial with a kernel on the device and the model's heads, None if it runs."""
    num_heads, num_key_heads, head_size = _head_shape(config)
    try:
        try_kernel(kernel, num_heads=num_heads, num_key_heads=num_key_heads, head_size=head_size)
    except Exception as error:  # a package built for another torch or GPU may raise anything
        return f"it fails in a trial ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return None


def _head_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """Returns (query heads, key heads, head size)."""
    text_config = config.get_text_config()
    num_heads = text_config.num_attention_heads
    head_size = getattr(text_config, "head_dim", None) or text_config.hidden_size // num_heads
    return num_heads, getattr(text_config, "num_key_value_heads", None) or num_heads, head_size


def _softcap(config: PretrainedConfig) -> float | None:
    """Returns the soft cap of attention scores, None without one."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def _supports(config: PretrainedConfig, feature: str) -> bool:
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    return bool(getattr(model_class, f"_supports_{feature}", False))
