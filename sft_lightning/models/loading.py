"""Load, check and save causal language models."""

import copy
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from sft_lightning.data.tokenization import load_tokenizer, tokenizer_fingerprint
from sft_lightning.errors import UserError
from sft_lightning.losses.model_hooks import install_label_loss
from sft_lightning.models.attention.selection import AttentionChoice, choose_attention
from sft_lightning.models.precision import Precision
from sft_lightning.system.files import user_path
from sft_lightning.system.out_of_memory import is_out_of_memory
from sft_lightning.system.remote_code import without_remote_code

logger = logging.getLogger(__name__)

Initialization = Literal["pretrained", "random"]

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def load_model(
    model_path: str,
    *,
    init: Initialization = "pretrained",
    precision: Precision | None = None,
    attn_implementation: AttentionChoice = "auto",
    device_type: str = "cpu",
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """Returns a causal language model, in training mode.

    Args:
        model_path: Folder or hub name.
        init: ``pretrained`` loads weights; ``random`` initializes them under torch's current seed.
        precision: Precision of training, 32-true by default. Floating-point parameters are converted to its dtype.
            FlashAttention needs 16-bit activations.
        attn_implementation: See :func:`choose_attention`.
        device_type: Device that the model will run on, ``cuda`` or ``cpu``. ``auto`` attention depends on it.
        gradient_checkpointing: Recompute activations in the backward pass instead of storing them.

    Raises:
        UserError: If the path does not hold a model and its weights, or the attention cannot run here.
    """
    config = load_config(model_path)
    model_path = user_path(model_path)
    if init == "pretrained":
        _require_weights(model_path)
    precision = precision or Precision.named("32-true")
    dtype = precision.parameter_dtype
    attention = choose_attention(
        config, attn_implementation, device_type=device_type, half_precision=precision.is_16_bit
    )
    model = _build(model_path, config, init, {"dtype": dtype, "attn_implementation": attention})
    _require_dtype(model, dtype)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _freeze_other_modalities(model)
    install_label_loss(model)
    return model.train()


def _build(model_path: str, config: PretrainedConfig, init: Initialization, options: dict[str, Any]) -> PreTrainedModel:
    """Returns the model with its weights. Raises UserError if they cannot be read or do not fit the config."""
    try:
        if init == "random":
            return without_remote_code(AutoModelForCausalLM.from_config, config, **options)
        loaded: Any = without_remote_code(
            AutoModelForCausalLM.from_pretrained, model_path, config=config, output_loading_info=True, **options
        )
    except UnpicklingError as error:
        # torch's own text proposes weights_only=False, which would run any code in the file.
        raise UserError(
            f"model.model_path '{model_path}' cannot be loaded: its weights are a pickle file that is damaged or holds "
            "more than tensors, possibly code; use a folder with model.safetensors"
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"model.model_path '{model_path}' cannot be loaded: {_in_one_line(error)}") from error
    model, report = loaded
    _require_all_weights(model_path, report["missing_keys"])
    _refuse_cut_model(model_path, report["unexpected_keys"], model)
    return model


def load_config(model_path: str) -> PretrainedConfig:
    """Returns the config of a causal language model, without the kernels that it may name.

    Raises:
        UserError: If the path does not hold such a config.
    """
    try:
        model_path = user_path(model_path)
    except UserError as error:
        raise UserError(f"model.model_path: {error}") from None
    folder = Path(model_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"model.model_path '{model_path}' is not a model: the folder has no config.json")
    if not folder.is_dir() and (folder.is_absolute() or model_path.startswith(".") or model_path.count("/") > 1):
        raise UserError(f"model.model_path '{model_path}' is neither a folder nor a hub name such as Qwen/Qwen2.5-0.5B")
    try:
        config = without_remote_code(AutoConfig.from_pretrained, model_path)
    except Exception as error:  # huggingface_hub raises a bare Exception for a field of the wrong type
        place = "has no usable config" if folder.is_dir() else "is not a local folder and cannot be loaded from the hub"
        raise UserError(f"model.model_path '{model_path}' {place}: {_in_one_line(error)}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"model.model_path '{model_path}' is a {config.model_type} model, not a causal language model")
    _require_full_precision(model_path, config)
    # A name such as owner/repository makes transformers fetch a kernel from the hub and run it, and in config.json it
    # overrides the argument of from_pretrained. The assignment also reaches sub-configs.
    config._attn_implementation = config._experts_implementation = None
    return config


def empty_model(model_path: str) -> PreTrainedModel:
    """Returns a model on the meta device, where parameters take no memory, from its ``config.json``.

    Raises:
        UserError: If the path does not hold a causal language model.
    """
    config = load_config(model_path)
    try:
        with torch.device("meta"):
            return without_remote_code(AutoModelForCausalLM.from_config, config)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model.model_path '{model_path}' cannot be built: {_in_one_line(error)}") from error


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model_path: str) -> None:
    """Checks that a tokenizer fits a model. Warns if a saved checkpoint would load with a different tokenizer.

    Raises:
        UserError: See :func:`check_vocabulary`.
    """
    check_vocabulary(model, tokenizer)
    if tokenizer.name_or_path != model_path and not survives_saving(model, tokenizer):
        logger.warning(
            "the tokenizer of '%s' loads as a different one from a folder of this model type: checkpoints will not "
            "reproduce the token ids of training; use the model's own tokenizer",
            tokenizer.name_or_path,
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError if the tokenizer has more tokens than the embedding has rows."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    num_rows = embedding.num_embeddings
    if len(tokenizer) > num_rows:
        raise UserError(
            f"data.tokenizer_path '{tokenizer.name_or_path}' has {len(tokenizer)} tokens but the embedding of "
            f"model.model_path has {num_rows} rows: use the model's own tokenizer or resize the embedding first"
        )


def survives_saving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a folder with this model and tokenizer loads with the same tokenizer.

    For some model types transformers ignores the saved tokenizer class and loads its own. Token ids after loading then
    differ from those in training.
    """
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return tokenizer_fingerprint(load_tokenizer(folder)) == tokenizer_fingerprint(tokenizer)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    state_dict: dict[str, Tensor] | None = None,
    eos_token_id: int | None = None,
) -> None:
    """Writes a folder that ``from_pretrained`` loads: config, generation config, safetensors, tokenizer.

    Args:
        model: Provides the config and, without ``state_dict``, the weights.
        tokenizer: Saved with the weights if given.
        folder: An existing, empty folder.
        state_dict: The weights, if they are gathered from several processes.
        eos_token_id: The stop token of training, which becomes that of the generation config.
    """
    own = model.generation_config
    # save_pretrained rejects the settings of some published models, such as a temperature without do_sample.
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=state_dict)
    finally:
        model.generation_config = own
    written = copy.deepcopy(own)
    if eos_token_id is not None:
        written.eos_token_id = eos_token_id
    written.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def hide_progress_bars() -> None:
    """Turns off transformers' progress bars, for programs that show their own progress."""
    hf_logging.disable_progress_bar()


def _freeze_other_modalities(model: PreTrainedModel) -> None:
    """Freezes what text does not reach, such as a vision tower.

    It gets no gradient either way, but DDP waits for the gradient of each parameter that is not frozen.
    """
    parts = getattr(model.config, "sub_configs", {}).keys()
    if "text_config" not in parts or parts.isdisjoint({"vision_config", "audio_config"}):
        return
    reached = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    trained = {id(parameter) for part in reached if part is not None for parameter in part.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def _require_full_precision(model_path: str, config: PretrainedConfig) -> None:
    for each in (config, config.get_text_config()):
        quantization = getattr(each, "quantization_config", None)
        if quantization:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
            raise UserError(
                f"model.model_path '{model_path}' holds quantized weights ({method}), which are not supported: "
                "name the model that they were made from"
            )


def _require_weights(model_path: str) -> None:
    folder = Path(model_path)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _WEIGHT_FILES):
        raise UserError(
            f"model.model_path '{model_path}' has config.json but no weights; set model.init random to start from "
            "random weights"
        )


def _require_all_weights(model_path: str, missing: Iterable[str]) -> None:
    if missing := sorted(missing):
        raise UserError(
            f"model.model_path '{model_path}' lacks {len(missing)} weights that its config.json defines, "
            f"{missing[0]} first, which would start random; use a config.json that fits the weights"
        )


def _refuse_cut_model(model_path: str, unused: Iterable[str], model: PreTrainedModel) -> None:
    """Raises UserError if the weights have more layers than the model: those would be dropped without a word."""

    def kind(name: str) -> str:
        return re.sub(r"\d+", "N", name)

    kinds = {kind(name) for name, _ in model.named_parameters()}
    if dropped := sorted(name for name in unused if kind(name) in kinds):
        raise UserError(
            f"model.model_path '{model_path}' holds {len(dropped)} weights of layers that its config.json does not "
            f"define, {dropped[0]} first; use a config.json that fits the weights"
        )


def _require_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Checks the dtype of the parameters. Those that a model keeps in float32, such as routers, may stay so in 16 bits.

    If float64 is asked for, these are widened.
    """
    for parameter in model.parameters():
        if parameter.dtype == torch.float32 and dtype == torch.float64:
            parameter.data = parameter.data.to(dtype)
    wrong = {p.dtype for p in model.parameters() if p.is_floating_point()} - {dtype, torch.float32}
    assert not wrong, f"asked for {dtype} parameters, got {wrong}"


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
