"""Test which attention implementation a model gets, and the reported reason."""

import copy
import logging
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, MambaConfig

from sft_lightning.errors import UserError
from sft_lightning.models.attention import selection
from sft_lightning.models.attention.kernels import try_kernel
from sft_lightning.models.attention.selection import choose_attention, needs_half_precision

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA = LlamaConfig(**SHAPE)
SOFT_CAPPED = Gemma2Config(**SHAPE, head_dim=8, attn_logit_softcapping=5.0, sliding_window=6)
PACKAGED = ("flash_attention_2", "flash_attention_3")


@pytest.fixture
def gpu(monkeypatch, install, uninstall):
    """A GPU as torch would describe it, without flash-attn; trials run on the CPU, with stand-ins for the kernels."""
    gpu = SimpleNamespace(capability=(9, 0))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: gpu.capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr(selection, "try_kernel", partial(try_kernel, device="cpu"))
    install("varlen")
    for kernel in PACKAGED:
        uninstall(kernel)
    return gpu


def choose(choice, device_type="cuda", half_precision=True, config=LLAMA):
    return choose_attention(config, choice, device_type=device_type, half_precision=half_precision)


def message_of(*args, **kwargs):
    with pytest.raises(UserError) as raised:
        choose(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("choice", "command"),
    [
        ("flash_attention_2", "flash-attn is not installed: pip install flash-attn --no-build"),
        ("flash_attention_3", "flash-attn-3 is not installed: pip install 'git+https://github.com/Dao-AILab/"),
    ],
)
def test_a_missing_package_names_the_install_command(gpu, choice, command, device_type):
    message = message_of(choice, device_type)
    assert message.startswith(f"model.attn_implementation '{choice}' cannot run here: ")
    assert f"the package {command}" in message


@pytest.mark.parametrize("choice", ["flash_attention_2", "flash_attention_3", "varlen"])
def test_a_kernel_that_cannot_run_here_is_refused(gpu, install, choice):
    if choice in PACKAGED:
        # Installing it would not help here, and nobody should find that out afterwards.
        assert "it needs 16-bit precision such as trainer.precision bf16-mixed, and the package" in message_of(
            choice, half_precision=False
        )
    install(choice)
    assert "it needs a CUDA device" in message_of(choice, "cpu")
    assert "it needs 16-bit precision" in message_of(choice, half_precision=False)
    wide = LlamaConfig(**{**SHAPE, "head_dim": 512})
    assert "heads have 512 dimensions" in message_of(choice, config=wide)
    gpu.capability = (7, 5)
    assert "it does not run on a GPU" in message_of(choice)


def test_options_a_kernel_lacks_are_refused_by_name(gpu, install):
    for kernel in PACKAGED:
        install(kernel)
    assert "it has no soft-capping" in message_of("varlen", config=SOFT_CAPPED)
    dropping = LlamaConfig(**SHAPE, attention_dropout=0.1)
    assert "it has no dropout" in message_of("varlen", config=dropping)
    assert "it has no dropout" in message_of("flash_attention_3", config=dropping)
    assert choose("flash_attention_2", config=dropping) == "sft_fa2"
    assert choose("flash_attention_2", config=SOFT_CAPPED) == "sft_fa2_eager"


@pytest.mark.parametrize(
    ("installed", "capability", "half_precision", "taken", "name", "reason"),
    [
        (PACKAGED, (9, 0), True, "flash_attention_3", "sft_fa3", "the best that runs"),
        (PACKAGED, (10, 0), True, "flash_attention_2", "sft_fa2", "the best that runs"),
        (PACKAGED, (8, 0), True, "flash_attention_2", "sft_fa2", "the best that runs"),
        ((), (8, 0), True, "varlen", "sft_varlen", "the best that runs here)"),
        ((), (7, 5), True, "sdpa", "sft_segments", "no FlashAttention: it does not run on a GPU)"),
        (PACKAGED, (9, 0), False, "sdpa", "sft_segments", "no FlashAttention: it needs 16-bit precision"),
    ],
)
def test_auto_takes_the_best_and_says_why(
    gpu, install, caplog, installed, capability, half_precision, taken, name, reason
):
    gpu.capability = capability
    for kernel in installed:
        install(kernel)
    caplog.set_level(logging.INFO, "sft_lightning.models.attention.selection")
    assert choose("auto", half_precision=half_precision) == name
    (message,) = caplog.messages
    assert message.startswith(f"attention: {taken} ({reason}")


def test_auto_names_the_package_that_a_soft_capped_model_needs(gpu, caplog):
    caplog.set_level(logging.INFO, "sft_lightning.models.attention.selection")
    assert choose("auto", config=SOFT_CAPPED) == "sft_segments_eager"
    (message,) = caplog.messages
    assert message.startswith(
        "attention: eager (no FlashAttention: the package flash-attn is not installed: pip install"
    )


def test_auto_without_a_gpu(caplog):
    caplog.set_level(logging.INFO, "sft_lightning.models.attention.selection")
    assert choose("auto", "cpu") == "sft_segments"
    assert caplog.messages == ["attention: sdpa (no FlashAttention: no CUDA device)"]


@pytest.mark.parametrize("claims_sdpa", [False, True])  # as with transformers 5.17, where sdpa ignores the soft cap
def test_a_model_without_sdpa_falls_back_on_its_eager_attention(monkeypatch, claims_sdpa):
    monkeypatch.setattr(Gemma2ForCausalLM, "_supports_sdpa", claims_sdpa)
    assert choose("auto", "cpu", config=SOFT_CAPPED) == "sft_segments_eager"
    assert choose("eager", "cpu") == "sft_segments_eager"
    assert "'sdpa' is not supported by this model" in message_of("sdpa", "cpu", config=SOFT_CAPPED)


def test_a_model_without_registered_attention_keeps_its_implementation():
    assert choose("auto", "cpu", config=MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1)) == "eager"


def test_which_attention_needs_half_precision():
    def model(config, attention):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention)

    assert needs_half_precision(model(LLAMA, "sft_fa2"))
    assert needs_half_precision(model(SOFT_CAPPED, "sft_varlen_eager"))
    assert not needs_half_precision(model(LLAMA, "sft_segments"))
    assert not needs_half_precision(model(LLAMA, "sdpa"))


def test_varlen_of_torch_2_11_is_taken(gpu, install):
    """It has no argument ``enable_gqa`` and takes grouped heads all the same."""
    install("varlen of torch 2.11")
    assert choose("varlen") == "sft_varlen"
    assert choose("auto") == "sft_varlen"


def test_a_kernel_that_fails_its_trial_is_refused(gpu, install, caplog):
    def varlen_attn(query, key, value, *args, **options):
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")

    install("varlen", varlen_attn)
    failure = "it fails in a trial (RuntimeError: CUDA error: no kernel image is available for execution on the device)"
    assert failure in message_of("varlen")
    caplog.set_level(logging.INFO, "sft_lightning.models.attention.selection")
    assert choose("auto") == "sft_segments"
    assert caplog.messages == [f"attention: sdpa (no FlashAttention: varlen: {failure})"]


def test_another_package_named_flash_attn_is_not_flash_attention_2(gpu, install, caplog):
    """The namespace folder of flash-attn-4 is importable as flash_attn, without the function."""
    install("flash_attention_2", ModuleType("flash_attn"))
    caplog.set_level(logging.INFO, "sft_lightning.models.attention.selection")
    assert choose("auto") == "sft_varlen"
    (message,) = caplog.messages
    assert message.startswith(
        "attention: varlen (the best that runs here; flash_attention_2: it fails in a trial (ImportError: "
        "cannot import name 'flash_attn_varlen_func' from 'flash_attn'"
    )
    assert "it fails in a trial (ImportError: cannot import name" in message_of("flash_attention_2")


def test_flash_attn_built_for_another_torch_is_reported(gpu, monkeypatch, tmp_path, caplog):
    package = tmp_path / "flash_attn"
    package.mkdir()
    package.joinpath("__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c105ErrorE')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn")
    caplog.set_level(logging.INFO, "sft_lightning.models.attention.selection")
    assert choose("auto") == "sft_varlen"
    (message,) = caplog.messages
    assert message == (
        "attention: varlen (the best that runs here; flash_attention_2: it fails in a trial "
        "(ImportError: undefined symbol: _ZN3c105ErrorE))"
    )


@pytest.mark.parametrize(("head_size", "deterministic", "name"), [(256, True, "sft_fa2"), (256, False, "sft_fa3")])
def test_flash_attention_3_has_no_deterministic_backward_for_wide_heads(gpu, install, head_size, deterministic, name):
    for kernel in PACKAGED:
        install(kernel)
    wide = LlamaConfig(**{**SHAPE, "head_dim": head_size})
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert choose("auto", config=wide) == name
        if deterministic:
            assert "no deterministic backward for heads of 256 dim" in message_of("flash_attention_3", config=wide)
    finally:
        torch.use_deterministic_algorithms(False)
