"""Compare the memory formula with the tensors that PyTorch saves, and with calculations by hand."""

import contextlib

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Olmo2Config, Qwen2Config, Qwen3Config

from sft_lightning.data.batch import Example
from sft_lightning.data.batching.collate import collate
from sft_lightning.diagnostics.check.layout_statistics import LargestMicroBatch
from sft_lightning.diagnostics.check.memory_estimate import (
    Device,
    ModelShape,
    activation_bytes_per_layer,
    check_memory,
    check_positions,
    estimate_memory,
    in_gib,
)
from sft_lightning.losses.model_hooks import label_losses
from sft_lightning.models.loading import empty_model, load_model
from sft_lightning.models.precision import Precision

SIZES = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "olmo2": Olmo2Config(**SIZES),
}
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true"]
CPU = Device("cpu", 2**30, is_cuda=False, is_known=True)


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    """A folder with a config and nothing else."""
    CONFIGS[request.param].save_pretrained(tmp_path)
    return str(tmp_path)


def kept_bytes(model, layout, precision):
    """Returns the bytes of all activations that autograd keeps for the backward pass, and their positions."""
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (4, 201)).astype(np.int32)
    batch = collate([Example.from_prompt(row, 100, "a:1") for row in tokens], [0.01] * 4, layout=layout, pad_token_id=0)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}  # holds the tensors, so that no address is used twice

    def keep(tensor):
        has_positions = {200, 800} & set(tensor.shape)  # not the copies of weights under autocast
        if tensor.untyped_storage().data_ptr() not in parameters and has_positions:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        label_losses(model, batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), batch.input_ids.numel()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_activation_bytes_equal_those_that_autograd_saves(folder, layout, precision):
    model = load_model(folder, init="random", precision=Precision.named(precision))
    measured, num_positions = kept_bytes(model, layout, precision)
    shape = ModelShape.of(empty_model(folder))
    layer = activation_bytes_per_layer(shape, Precision.named(precision), float32_attention=layout == "packed")
    last_norm = 8 * shape.hidden_size
    assert num_positions * (shape.num_layers * layer + last_norm) == pytest.approx(measured, rel=0.2)


def test_shape_of_an_empty_model_equals_the_loaded_one(folder):
    model = load_model(folder, init="random")
    empty, loaded = ModelShape.of(empty_model(folder)), ModelShape.of(model)
    assert empty == loaded
    assert empty.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def shape_by_hand(**changes):
    values = {
        "num_parameters": 1000,
        "num_input_embeddings": 200,
        "vocabulary_size": 50,
        "hidden_size": 4,
        "num_layers": 3,
        "norm_size": 8,
        "query_size": 4,
        "key_size": 2,
        "inner_size": 10,
        "max_positions": 64,
    }
    return ModelShape(**{**values, **changes})


def estimate(precision, *, device=CPU, checkpointing=False, packed=False, entropy=True, labels=7):
    return estimate_memory(
        shape_by_hand(),
        LargestMicroBatch(num_positions=100, num_labels=labels, width=50),
        precision=Precision.named(precision),
        device=device,
        packed=packed,
        with_entropy=entropy,
        gradient_checkpointing=checkpointing,
    )


def test_float32_estimate_equals_the_sum_by_hand():
    # A layer: 8 * 8 for the norms, 4 * (2 * 4 + 4 * 10) for inputs and feed-forward, 4 * 12 for attention: 304.
    # A position: 3 * 304 + 8 * 4 + 3 * 4 * 10 = 1064. Loss: 7 * 50 * 8 + 4 * 50 * 4 + 7 * 4 * 8 = 2800 + 800 + 224.
    assert estimate("32-true").parts == {
        "weights": 4000,
        "gradients": 4000,
        "optimizer": 8000,
        "16-bit copies": 0,
        "activations": 106400,
        "loss": 3824,
    }


def test_autocast_estimate_equals_the_sum_by_hand():
    # A layer: 8 * 8 + 2 * (5 * 4 + 40) + 2 * 12 = 208. A position: 3 * 208 + 32 + 3 * 2 * 10 = 716.
    # Loss: 7 * 50 * (8 + 2) + (4 + 2) * 50 * 4 + 7 * 4 * 6 = 3500 + 1200 + 168.
    parts = estimate("bf16-mixed").parts
    assert (parts["16-bit copies"], parts["activations"], parts["loss"]) == (1600, 71600, 4868)


def test_checkpointing_keeps_layer_inputs_and_one_layer():
    # 3 * 4 * 4 + 304 + 32 + 120 = 504 bytes a position.
    assert estimate("32-true", checkpointing=True).parts["activations"] == 50400


def test_pure_16_bit_halves_the_state():
    assert estimate("bf16-true").state_bytes * 2 == estimate("32-true").state_bytes == 16000


def test_fitting_positions_leave_a_tenth_free():
    # Beside activations there are 19,824 bytes; 0.9 * 126,224 - 19,824 = 93,777 are 88 positions of 1,064 bytes.
    found = estimate("32-true", device=Device("d", 126_224, is_cuda=False, is_known=True))
    assert (found.total_bytes, found.num_fitting_positions) == (126_224, 88)


@pytest.mark.parametrize(
    ("memory_bytes", "is_known", "severities"),
    [(2**20, True, []), (126_224, True, ["warning"]), (10_000, True, ["error"]), (10_000, False, ["warning"])],
)
def test_a_model_too_large_for_the_device_is_an_error(memory_bytes, is_known, severities):
    device = Device("some device", memory_bytes, is_cuda=True, is_known=is_known)
    found = check_memory(estimate("32-true", device=device))
    assert [finding.severity for finding in found] == severities


def test_rows_over_the_position_limit_are_a_warning():
    assert check_positions(shape_by_hand(), 64) == []
    (finding,) = check_positions(shape_by_hand(), 65)
    assert (finding.name, finding.severity) == ("positions", "warning")
    assert check_positions(shape_by_hand(max_positions=None), 10**6) == []


def test_an_unknown_architecture_has_no_estimate():
    class Odd(torch.nn.Module):
        class config:  # noqa: N801
            @staticmethod
            def get_text_config():
                return object()

        def get_output_embeddings(self):
            return torch.nn.Linear(1, 1)

    assert ModelShape.of(Odd()) is None


def test_bytes_are_shown_in_gib_or_mib():
    assert (in_gib(3 * 2**29), in_gib(5 * 2**20)) == ("1.5 GiB", "5 MiB")
