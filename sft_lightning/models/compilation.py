"""Compile a model's layers one by one and in place.

Layers of one class share their graphs, so compiling 28 of them takes as long as compiling two. Names, weights, hooks
and checkpoints do not change. Graphs accept any length, since every micro-batch has a different one. Attention over
segments is not compiled, since the segments differ every time. The layout check and generation would need separate
graphs, so they run uncompiled, under ``torch.compiler.set_stance("force_eager")``.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sft_lightning.data.batch import Example, Layout, MicroBatch
from sft_lightning.data.batching.collate import collate
from sft_lightning.data.batching.prefix_trie import MIN_SHARED_TOKENS
from sft_lightning.distributed.fsdp import gradients_of
from sft_lightning.errors import UserError
from sft_lightning.losses.model_hooks import label_losses

# Limit of graphs of one function, beyond which calls run uncompiled. Training and validation need different graphs, and
# so do zero, one and several rows and the kinds of layers in a model.
_MAX_GRAPHS = 64
# Size of the trial batch. Kernels are tuned for the first sizes they see, so it is close to that of training.
_NUM_ROWS = 3
_ROW_TOKENS = 342


def compile_layers(model: PreTrainedModel, *, backend: str = "inductor") -> None:
    """Makes each layer of a model compile itself when it is first called.

    Args:
        model: Model from ``load_model``.
        backend: Backend of ``torch.compile``.

    Raises:
        UserError: If the model recomputes activations or has no known layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"model.compile: {type(model).__name__} has no layers that can be compiled; set it to false")
    if any(layer.gradient_checkpointing for layer in layers):
        raise UserError("model.compile cannot be combined with model.gradient_checkpointing: set one of them to false")
    import torch._dynamo.config as dynamo_config

    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, _MAX_GRAPHS)
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)


def try_compiled(model: PreTrainedModel, layout: Layout, *, precision: Callable[[], AbstractContextManager]) -> None:
    """Compiles a model's layers for training with a step on random rows that does not change the model.

    Errors appear before training, and a resumed run compiles for the same sizes as an uninterrupted one.

    Args:
        model: Model after ``compile_layers``, on its device, in training mode.
        layout: Layout of the micro-batches.
        precision: Returns a context manager that enters the precision of training.

    Raises:
        UserError: If the layers cannot be compiled here.
    """
    batch = _random_batch(model, layout).to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), precision():
            gradients_of(model, lambda: label_losses(model, batch).weighted_sum)
    except Exception as error:  # a compiler may raise anything on an unsupported model
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.compile does not work here ({type(error).__name__}: {text}); it needs a model that torch.compile "
            "supports, a C++ compiler such as g++ and, on CUDA, triton: install what is missing, or set it to false"
        ) from error


def _random_batch(model: PreTrainedModel, layout: Layout) -> MicroBatch:
    """Returns random rows with a common prefix. Sizes are distinct: the compiler assumes that equal ones stay equal."""
    num_tokens = min(
        _ROW_TOKENS, getattr(model.config.get_text_config(), "max_position_embeddings", None) or _ROW_TOKENS
    )
    vocabulary_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    rows = np.random.default_rng(0).integers(0, vocabulary_size, (_NUM_ROWS, num_tokens)).astype(np.int32)
    rows[:, : MIN_SHARED_TOKENS + 1] = rows[0, : MIN_SHARED_TOKENS + 1]
    examples = [Example.from_prompt(row, num_tokens - 2, f"random row {number}") for number, row in enumerate(rows)]
    return collate(examples, np.ones(_NUM_ROWS), layout=layout, pad_token_id=0)
