import pytest
import torch

from sft_lightning.models.precision import Precision


@pytest.mark.parametrize(
    ("name", "parameters", "matmul", "is_16_bit", "scales_gradients"),
    [
        ("32-true", torch.float32, torch.float32, False, False),
        ("64-true", torch.float64, torch.float64, False, False),
        ("bf16-true", torch.bfloat16, torch.bfloat16, True, False),
        ("16-true", torch.float16, torch.float16, True, False),
        ("bf16-mixed", torch.float32, torch.bfloat16, True, False),
        ("16-mixed", torch.float32, torch.float16, True, True),
    ],
)
def test_names_of_the_trainer_resolve_to_dtypes(name, parameters, matmul, is_16_bit, scales_gradients):
    precision = Precision.named(name)
    assert precision.name == name
    assert (precision.parameter_dtype, precision.matmul_dtype) == (parameters, matmul)
    assert (precision.is_16_bit, precision.scales_gradients) == (is_16_bit, scales_gradients)
    assert (precision.autocast_dtype is None) == name.endswith("true")


@pytest.mark.parametrize(
    ("short", "full"), [(16, "16-mixed"), ("bf16", "bf16-mixed"), (32, "32-true"), ("64", "64-true")]
)
def test_short_names_are_those_of_lightning(short, full):
    from lightning.fabric.connector import _convert_precision_to_unified_args

    assert Precision.named(short) == Precision.named(full)
    assert _convert_precision_to_unified_args(short) == full


def test_an_unset_precision_is_the_trainers_default():
    from lightning.pytorch import Trainer

    trainer = Trainer(accelerator="cpu", precision=None, logger=False, enable_checkpointing=False)
    assert Precision.named(None) == Precision.named(trainer.precision) == Precision.named("32-true")


def test_unknown_names_count_as_float32():
    precision = Precision.named("transformer-engine-float16")
    assert (precision.parameter_dtype, precision.matmul_dtype) == (torch.float32, torch.float32)
    assert precision.name == "transformer-engine-float16"
