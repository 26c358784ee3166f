"""Compile a model's layers one by one and in place.

Layers of one class share their graphs, so compiling 28 of them takes as long as compiling two. Names, weights, hooks
and checkpoints do not change. Lengths differ in every micro-batch, so graphs are compiled for any length from the
start. Attention over segments is not compiled, since the segments differ every time. The layout check and generation
would need graphs of their own and run uncompiled, under ``torch.compiler.set_stance("force_eager")``.
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

# Graphs of one function: training and validation, one row and several, a micro-batch without rows, and each of these
# for every kind of layer that a model mixes. Beyond this limit, calls run uncompiled.
_MAX_GRAPHS = 64
# Rows and tokens of the trial. Kernels are tuned to the first sizes seen, so these are close to those of training.
_NUM_ROWS = 3
_ROW_TOKENS = 342


def compile_layers(model: PreTrainedModel, *, backend: str = "inductor") -> None:
    """Makes each layer of a model compile itself when it is first called.

    Args:
        model: From ``load_model``.
        backend: Of ``torch.compile``.

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
    """Compiles a model's layers for training by a step on random rows that does not change the model.

    Problems show before training, and a resumed run compiles for the same sizes as one from the start.

    Args:
        model: After ``compile_layers``, on its device, in training mode.
        layout: Of the micro-batches of training.
        precision: Enters the precision of training.

    Raises:
        UserError: If the layers cannot be compiled here.
    """
    batch = _random_batch(model, layout).to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), precision():
            gradients_of(model, lambda: label_losses(model, batch).weighted_sum)
    except Exception as error:  # a compiler may raise anything on a model it was not written for
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.compile does not work here ({type(error).__name__}: {text}); it needs a model that torch.compile "
            "supports, a C++ compiler such as g++ and, on CUDA, triton: install what is missing, or set it to false"
        ) from error


def _random_batch(model: PreTrainedModel, layout: Layout) -> MicroBatch:
    """Returns rows of random tokens that share a prefix, of odd length: the compiler assumes equal sizes stay equal."""
    num_tokens = min(
        _ROW_TOKENS, getattr(model.config.get_text_config(), "max_position_embeddings", None) or _ROW_TOKENS
    )
    vocabulary_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    rows = np.random.default_rng(0).integers(0, vocabulary_size, (_NUM_ROWS, num_tokens)).astype(np.int32)
    rows[:, : MIN_SHARED_TOKENS + 1] = rows[0, : MIN_SHARED_TOKENS + 1]
    examples = [Example(row, num_tokens - 2, f"random row {number}") for number, row in enumerate(rows)]
    return collate(examples, np.ones(_NUM_ROWS), layout=layout, pad_token_id=0)
