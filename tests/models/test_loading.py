import copy
import json
import os
import socket
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Ernie4_5_MoeConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Qwen2Config,
    ViTConfig,
)

from sft_lightning.data.batch import Example
from sft_lightning.data.batching.collate import collate
from sft_lightning.data.tokenization import load_tokenizer
from sft_lightning.errors import UserError
from sft_lightning.losses.model_hooks import label_losses
from sft_lightning.models.loading import (
    check_vocabulary,
    empty_model,
    load_config,
    load_model,
    save_model,
    survives_saving,
)
from sft_lightning.models.precision import Precision

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,  # wide, so that soft-capping and scaling change the logits by a lot
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
WITHOUT_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
ARCHITECTURES = {
    "qwen2-tied": Qwen2Config(**SHAPE, num_key_value_heads=1, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=False),
    "gpt2": GPT2Config(
        **{"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5},
        **{"bos_token_id": None, "eos_token_id": None},
        **WITHOUT_DROPOUT,
    ),
    "gemma2-soft-capped": Gemma2Config(**SHAPE, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0),
    "gpt-neox": GPTNeoXConfig(**SHAPE, attention_dropout=0.0, hidden_dropout=0.0),
    "cohere-scaled": CohereConfig(**SHAPE, num_key_value_heads=2, logit_scale=0.0625),
    "granite-scaled": GraniteConfig(**SHAPE, num_key_value_heads=2, logits_scaling=7.0),
}


def make_model(name="llama"):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES[name]), dtype=torch.float32)


def example(*tokens, prompt_length):
    return Example.from_prompt(np.array(tokens, dtype=np.int32), prompt_length)


def make_batch():
    """Rows of 5, 3 and 6 tokens: 4, 2 and 5 inputs padded to 5, so positions 1 2 3, 5, and 12 13 14 predict labels."""
    rows = [
        example(11, 12, 13, 14, 15, prompt_length=2),
        example(21, 22, 23, prompt_length=1),
        example(31, 32, 33, 34, 35, 36, prompt_length=3),
    ]
    batch = collate(rows, np.ones(3), layout="padded", pad_token_id=0)
    assert batch.label_positions.tolist() == [1, 2, 3, 5, 6, 12, 13, 14]
    return batch


@pytest.fixture
def folder(tmp_path):
    """An untied llama on disk."""
    make_model().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def message_of(call, *args, **kwargs):
    with pytest.raises(UserError) as raised:
        call(*args, **kwargs)
    message = str(raised.value)
    assert "\n" not in message
    return message


# Loading


def test_gradient_checkpointing_recomputes_and_gives_equal_gradients(folder):
    gradients, num_calls = [], []
    for checkpointing in (False, True):
        model = load_model(str(folder), gradient_checkpointing=checkpointing)
        calls = []
        model.model.layers[0].self_attn.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        batch = make_batch()
        label_losses(model, batch).weighted_sum.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        num_calls.append(len(calls))
    assert num_calls == [1, 2]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("precision", "asked"), [("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32), ("64-true", torch.float64)]
)
@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_parameters_have_the_requested_dtype_after_loading(tmp_path, stored, precision, asked, init):
    make_model().to(stored).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), init=init, precision=Precision.named(precision))
    assert {parameter.dtype for parameter in model.parameters()} == {asked}
    assert model.training


@pytest.mark.parametrize("init", ["pretrained", "random"])
@pytest.mark.parametrize(
    ("precision", "asked", "of_routers"),
    [
        ("bf16-true", torch.bfloat16, torch.float32),
        ("bf16-mixed", torch.float32, torch.float32),
        ("64-true", torch.float64, torch.float64),
    ],
)
def test_routers_that_transformers_keeps_in_float32(tmp_path, precision, asked, of_routers, init):
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8, "moe_layer_start_index": 0}
    config = Ernie4_5_MoeConfig(**SHAPE, **experts, num_key_value_heads=2, moe_num_shared_experts=1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), init=init, precision=Precision.named(precision))
    dtypes = {(".gate." in name, parameter.dtype) for name, parameter in model.named_parameters()}
    assert dtypes == {(True, of_routers), (False, asked)}
    if precision != "64-true":  # torch has no grouped matrix product in float64
        assert label_losses(model, make_batch()).weighted_sum.isfinite()


def test_pretrained_loads_the_stored_weights(folder):
    expected = make_model().state_dict()
    actual = load_model(str(folder)).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())


def test_random_follows_the_seed_and_needs_no_weights(folder):
    (folder / "model.safetensors").unlink()
    torch.manual_seed(5)
    first = load_model(str(folder), init="random").lm_head.weight
    torch.manual_seed(5)
    again = load_model(str(folder), init="random").lm_head.weight
    other = load_model(str(folder), init="random").lm_head.weight
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_folder_without_weights_names_the_option(folder):
    (folder / "model.safetensors").unlink()
    assert message_of(load_model, str(folder)) == (
        f"model.model_path '{folder}' has config.json but no weights; set model.init random to start from random "
        "weights"
    )


@pytest.mark.parametrize("kept_bytes", [0, 100, 2000])
def test_cut_off_weights_are_named(folder, kept_bytes):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept_bytes])
    assert message_of(load_model, str(folder)).startswith(f"model.model_path '{folder}' cannot be loaded: ")


def test_weights_that_are_missing_are_refused_instead_of_starting_random(folder):
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"]
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers + 1}))
    message = message_of(load_model, str(folder))
    assert "weights that its config.json defines" in message
    assert f"model.layers.{layers}." in message


def test_weights_of_another_shape_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    assert message_of(load_model, str(folder)).startswith(f"model.model_path '{folder}' cannot be loaded: ")


def test_local_folders_load_without_network(folder, no_network):
    load_model(str(folder))
    load_model(str(folder), init="random")


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "../a/b", "some/where/else"])
def test_an_invalid_model_path_never_reaches_the_network(path, no_network):
    assert message_of(load_model, path) == (
        f"model.model_path '{path}' is neither a folder nor a hub name such as Qwen/Qwen2.5-0.5B"
    )


def test_an_unreachable_hub_name_is_named(monkeypatch, tmp_path, no_network):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = message_of(load_model, "someone/nothing")
    assert message.startswith(
        "model.model_path 'someone/nothing' is not a local folder and cannot be loaded from the hub: "
    )


def test_a_folder_without_config_is_refused(tmp_path):
    assert message_of(load_config, str(tmp_path)) == (
        f"model.model_path '{tmp_path}' is not a model: the folder has no config.json"
    )


@pytest.mark.parametrize(
    "text", ["{cut", "{}", "[]", '{"model_type": "nothing"}', '{"model_type": "llama", "hidden_size": "wide"}']
)
def test_an_unusable_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert message_of(load_config, str(tmp_path)).startswith(f"model.model_path '{tmp_path}' has no usable config: ")


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_a_model_of_another_kind_is_refused(tmp_path, init):
    ViTConfig().save_pretrained(tmp_path)
    assert message_of(load_model, str(tmp_path), init=init) == (
        f"model.model_path '{tmp_path}' is a vit model, not a causal language model"
    )


@pytest.mark.parametrize(("name", "registered"), [("sdpa", "sft_segments"), ("eager", "sft_segments_eager")])
def test_the_chosen_attention_reaches_the_model(folder, name, registered):
    assert load_model(str(folder), attn_implementation=name).config._attn_implementation == registered


def test_load_model_refuses_flash_attention_before_it_reads_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")
    assert "pip install" in message_of(load_model, str(folder), attn_implementation="flash_attention_2")


# Vocabulary


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer):
    size = len(tokenizer)
    model = SimpleNamespace(get_input_embeddings=lambda: nn.Embedding(size - 1, 2))
    assert message_of(check_vocabulary, model, tokenizer) == (
        f"data.tokenizer_path '{tokenizer.name_or_path}' has {size} tokens but the embedding of model.model_path has "
        f"{size - 1} rows: use the model's own tokenizer or resize the embedding first"
    )


@pytest.mark.parametrize("spare_rows", [0, 64])
def test_an_embedding_with_spare_rows_is_fine(tokenizer, spare_rows):
    check_vocabulary(
        SimpleNamespace(get_input_embeddings=lambda: nn.Embedding(len(tokenizer) + spare_rows, 2)), tokenizer
    )


# Saving


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_plain_transformers_reloads_a_saved_model_bit_equal(tmp_path, name):
    make_model(name).save_pretrained(tmp_path / "original")
    model = load_model(str(tmp_path / "original"), gradient_checkpointing=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    (tmp_path / "saved").mkdir()
    save_model(model, None, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    batch = make_batch()
    expected = model.eval()(input_ids=batch.input_ids).logits
    assert torch.equal(again(input_ids=batch.input_ids).logits, expected)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_config_json_is_that_of_plain_transformers(folder, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "plain").mkdir()
    save_model(load_model(str(folder), gradient_checkpointing=True), None, tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "plain")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "saved" / name).read_text() == (tmp_path / "plain" / name).read_text()
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_the_generation_config_stops_at_the_supervised_token(folder, tmp_path):
    published = {"eos_token_id": [5, 6], "do_sample": True, "top_p": 0.8, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(published))
    model = load_model(str(folder))
    save_model(model, None, tmp_path, eos_token_id=9)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved.pop("transformers_version")
    assert saved == {**published, "eos_token_id": 9}
    assert model.generation_config.eos_token_id == [5, 6]
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 9


def test_a_generation_config_that_transformers_rejects_is_saved(folder, tmp_path):
    """Such as Llama 2's: a temperature without do_sample."""
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    save_model(load_model(str(folder)), None, tmp_path, eos_token_id=9)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["eos_token_id"]) == (0.6, 0.9, 9)
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_given_weights_are_saved_instead_of_the_models(folder, tmp_path):
    model = load_model(str(folder))
    weights = {name: torch.full_like(weight, 0.5) for name, weight in model.state_dict().items()}
    save_model(model, None, tmp_path, state_dict=weights)
    assert all((weight == 0.5).all() for weight in AutoModelForCausalLM.from_pretrained(tmp_path).parameters())


def test_the_tokenizer_is_saved_beside(folder, tmp_path, tokenizer):
    save_model(load_model(str(folder)), tokenizer, tmp_path)
    text = "again <think> 12 </think>"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer(text).input_ids


def test_a_tokenizer_that_a_model_folder_would_replace_is_found(tokenizer, model_folder):
    """The fixture's tokenizer is a plain one; a Qwen2 folder loads with Qwen2's own pre-tokenizer instead."""
    model = load_model(model_folder)
    assert survives_saving(model, load_tokenizer(model_folder))
    assert not survives_saving(model, tokenizer)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_empty_model_has_the_configs_shapes_without_memory(name, tmp_path):
    ARCHITECTURES[name].save_pretrained(tmp_path)
    empty = empty_model(str(tmp_path))
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    full = AutoModelForCausalLM.from_config(ARCHITECTURES[name])
    shapes = {key: tuple(parameter.shape) for key, parameter in full.named_parameters(remove_duplicate=False)}
    assert {key: tuple(p.shape) for key, p in empty.named_parameters(remove_duplicate=False)} == shapes


def test_an_empty_model_needs_a_config(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        empty_model(str(tmp_path))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_quantized_weights_are_refused_before_they_are_read(folder, note_fault, method):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    for load in (load_model, empty_model):
        message = message_of(load, str(folder))
        assert message.startswith(f"model.model_path '{folder}' holds quantized weights ({method}), ")
    note_fault(
        "model folder with quantized weights",
        provoked="a config.json that names GPTQ, AWQ and bitsandbytes",
        outcome="exit 2 before weights are read, also in `check`, with the method",
        tries=3,
    )


def test_a_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_model(f"~/{folder.name}").num_parameters() == load_model(str(folder)).num_parameters()


@pytest.fixture
def vision_model_folder(tmp_path, tokenizer):
    text = {
        **{"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 64},
    }
    vision = {
        **{"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"image_size": 28, "patch_size": 14},
    }
    tokens = {"image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5, "mm_tokens_per_image": 1}
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **tokens)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_what_text_does_not_reach_is_frozen(vision_model_folder):
    model = load_model(vision_model_folder)
    frozen = {name.split(".")[1] for name, weight in model.named_parameters() if not weight.requires_grad}
    trained = {name.split(".")[1] for name, weight in model.named_parameters() if weight.requires_grad}
    assert (frozen, trained) == ({"vision_tower", "multi_modal_projector"}, {"language_model"})
    model(input_ids=torch.arange(6, 12)[None]).logits.sum().backward()
    assert {name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None} == set()


def test_a_vision_model_trains_on_text_under_ddp(fit, vision_model_folder):
    before = dict(os.environ)  # to which Lightning adds a port, a rank and a number of processes
    options = {"model": {"model_path": vision_model_folder}, "data": {"tokenizer_path": vision_model_folder}}
    try:
        ours = fit(max_steps=3, strategy="ddp", devices=1, **options)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)
    assert ours.losses == pytest.approx(fit(max_steps=3, **options).losses, rel=1e-6)
