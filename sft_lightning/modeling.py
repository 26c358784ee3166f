"""Models: loading with an explicit dtype, the choice of attention, and logits at label positions only."""

import copy
import importlib.util
import logging
from collections.abc import Iterable
from pathlib import Path
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

from sft_lightning.data.batch import MicroBatch
from sft_lightning.data.tokenization import load_tokenizer, tokenizer_fingerprint
from sft_lightning.errors import UserError

logger = logging.getLogger(__name__)

Initialization = Literal["pretrained", "random"]
AttentionChoice = Literal["auto", "flash_attention_2", "sdpa", "eager"]

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def load_model(
    model_path: str,
    *,
    init: Initialization = "pretrained",
    dtype: torch.dtype = torch.float32,
    attn_implementation: AttentionChoice = "auto",
    device_type: str = "cpu",
    half_precision: bool = False,
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """Returns a causal language model, in training mode, with every floating-point parameter of the given dtype.

    Args:
        model_path: Folder or hub name.
        init: ``pretrained`` loads weights; ``random`` builds from ``config.json`` under torch's current seed.
        dtype: Of the parameters. Always passed on, because transformers would otherwise take the checkpoint's own.
        attn_implementation: See :func:`choose_attention`.
        device_type: Where the model will run, ``cuda`` or ``cpu``: decides what ``auto`` attention may take.
        half_precision: Whether activations will be bfloat16 or float16, which FlashAttention needs.
        gradient_checkpointing: Recompute activations in the backward pass instead of storing them.

    Raises:
        UserError: If the path holds no model or no weights, or the attention cannot run here.
    """
    config = load_config(model_path)
    if init == "pretrained":
        _require_weights(model_path)
    attention = choose_attention(config, attn_implementation, device_type=device_type, half_precision=half_precision)
    missing: Iterable[str] = ()
    try:
        if init == "random":
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model_path, dtype=dtype, attn_implementation=attention, output_loading_info=True
            )
            model, missing = loaded[0], loaded[1]["missing_keys"]
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.model_path '{model_path}' cannot be loaded: {_in_one_line(error)}") from error
    _require_all_weights(model_path, missing)
    wrong = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != dtype}
    assert not wrong, f"asked for {dtype} parameters, got {wrong}"
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    install_label_selection(model)
    return model.train()


def load_config(model_path: str) -> PretrainedConfig:
    """Returns a causal language model's config. Raises UserError if the path holds none."""
    folder = Path(model_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"model.model_path '{model_path}' is a folder without config.json, so it is no model")
    if not folder.is_dir() and (folder.is_absolute() or model_path.startswith(".") or model_path.count("/") > 1):
        raise UserError(f"model.model_path '{model_path}' is neither a folder nor a hub name such as Qwen/Qwen2.5-0.5B")
    try:
        config = AutoConfig.from_pretrained(model_path)
    except Exception as error:  # a field of the wrong type raises a bare Exception of huggingface_hub's
        place = "has no usable config" if folder.is_dir() else "is no folder here and cannot be loaded from the hub"
        raise UserError(f"model.model_path '{model_path}' {place}: {_in_one_line(error)}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"model.model_path '{model_path}' is a {config.model_type} model, no causal language model")
    return config


def choose_attention(
    config: PretrainedConfig, choice: AttentionChoice, *, device_type: str, half_precision: bool
) -> str:
    """Returns the attention implementation by its transformers name.

    ``auto`` takes FlashAttention 2 where its package is installed and it can run (CUDA, half precision), else torch's
    scaled dot product attention, and says in one line which and why.

    Raises:
        UserError: If FlashAttention is asked for by name and cannot run here.
    """
    installed = importlib.util.find_spec("flash_attn") is not None
    if choice == "flash_attention_2":
        if not installed:
            raise UserError(
                f"model.attn_implementation '{choice}' needs the package flash-attn: "
                "pip install 'sft-lightning[flash-attn]' --no-build-isolation"
            )
        if device_type != "cuda" or not half_precision:
            raise UserError(
                f"model.attn_implementation '{choice}' needs a CUDA device and 16-bit precision such as "
                "trainer.precision bf16-mixed; use sdpa here"
            )
    if choice != "auto":
        return choice
    obstacles = {
        "no CUDA device": device_type != "cuda",
        "flash-attn is not installed": not installed,
        "FlashAttention needs 16-bit precision": not half_precision,
        "the model has no FlashAttention": not _supports(config, "flash_attn"),
    }
    reason = next((text for text, stands_in_the_way in obstacles.items() if stands_in_the_way), None)
    if reason is None:
        logger.info("attention: flash_attention_2 (its package is installed, CUDA, 16-bit precision)")
        return "flash_attention_2"
    taken = "sdpa" if _supports(config, "sdpa") else "eager"
    logger.info("attention: %s (%s)", taken, reason)
    return taken


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model_path: str) -> None:
    """Checks that a tokenizer and a model go together, in training and in what is saved of it.

    Raises:
        UserError: See :func:`check_vocabulary`.
    """
    check_vocabulary(model, tokenizer)
    if tokenizer.name_or_path != model_path and not survives_saving(model, tokenizer):
        logger.warning(
            "the tokenizer of '%s' loads as another one from a folder of this model type: checkpoints will not give "
            "the ids of training; take the model's own tokenizer",
            tokenizer.name_or_path,
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError if the tokenizer can produce an id that the embedding has no row for."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    num_rows = embedding.num_embeddings
    if len(tokenizer) > num_rows:
        raise UserError(
            f"data.tokenizer_path '{tokenizer.name_or_path}' has {len(tokenizer)} tokens but the embedding of "
            f"model.model_path has {num_rows} rows: take the model's own tokenizer or resize the embedding first"
        )


def survives_saving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a folder with this model and tokenizer loads with the same tokenizer.

    For some model types transformers takes a tokenizer class of its own, whatever was saved beside the model; token ids
    after loading then differ from those in training.
    """
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return tokenizer_fingerprint(load_tokenizer(folder)) == tokenizer_fingerprint(tokenizer)


class _LabelSelection:
    """Lets a causal LM compute logits at label positions only, inside its own forward.

    The model is called with one more keyword, ``label_positions``; the hidden states are narrowed right before the
    output embedding, so that whatever the model does to its logits afterwards (scaling, soft-capping) still happens,
    and so that wrappers around the model (DDP, FSDP2, PEFT, compile) see one ordinary call.
    """

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        self.selected = False

    def before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.positions = kwargs.pop("label_positions", None)
        self.selected = False
        return args, kwargs

    def before_head(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.positions is None:
            return None
        self.selected = True
        return (args[0].flatten(0, 1)[self.positions].unsqueeze(0), *args[1:])

    def after_model(self, module: nn.Module, args: tuple, output: Any) -> Any:
        positions, self.positions = self.positions, None
        if positions is not None and output is not None and not self.selected:
            # A model that does not call its output embedding as a module: correct, and as slow as without us.
            output.logits = output.logits.flatten(0, 1)[positions].unsqueeze(0)
        return output


def install_label_selection(model: PreTrainedModel) -> None:
    """Teaches ``model.forward`` the keyword ``label_positions``. Adds hooks only: weights, names and config stay."""
    selection = _LabelSelection()
    model.register_forward_pre_hook(selection.before_model, with_kwargs=True)
    model.register_forward_hook(selection.after_model, always_call=True)
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(selection.before_head)


def label_logits(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Returns the logits that predict the batch's labels. Shape [M, V], in the dtype the model computes in."""
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        label_positions=batch.label_positions,
        use_cache=False,
    )
    return output.logits.squeeze(0)


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
        model: Gives the config and, without ``state_dict``, the weights.
        tokenizer: Written beside the weights.
        folder: Exists and is empty.
        state_dict: The weights, where they were gathered from elsewhere.
        eos_token_id: The stop token that training supervised: the generation config will stop at it.
    """
    own = model.generation_config
    # save_pretrained refuses what some published models do have, such as a temperature without do_sample.
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
    """Turns off transformers' progress bars of loading and saving, for programs that show a progress of their own."""
    hf_logging.disable_progress_bar()


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
            f"model.model_path '{model_path}' lacks weights that its config.json asks for, {missing[0]} first of "
            f"{len(missing)}: they would start random; take a config.json that fits the weights"
        )


def _supports(config: PretrainedConfig, attention: str) -> bool:
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    return bool(getattr(model_class, f"_supports_{attention}", False))


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
