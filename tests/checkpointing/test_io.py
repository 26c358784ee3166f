"""Test HFCheckpointIO alone: the files it writes, reads and refuses."""

import copy
import hashlib
import json
import os
import pickle
import random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from sft_lightning.checkpointing.io import HFCheckpointIO
from sft_lightning.errors import UserError


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def make_model(*, tied, seed, vocabulary_size=12, num_layers=2):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=3,
    )
    return Qwen2ForCausalLM(config)


class Holder(nn.Module):
    """What HFCheckpointIO knows of the LightningModule: its model, and its state dict with the prefix `model.`."""

    def __init__(self, model):
        super().__init__()
        self.model = model


def checkpoint_io(model, *, during="fit", datamodule=None):
    state = SimpleNamespace(fn=during)
    return HFCheckpointIO(SimpleNamespace(state=state, lightning_module=Holder(model), datamodule=datamodule))


HEAD = {"epoch": 1, "pytorch-lightning_version": "2.6.0"}


def lightning_checkpoint(model):
    """A checkpoint with everything in it that Lightning, torch and our callbacks put there."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.tensor([[1, 2, 5]])).logits.square().sum().backward()
    optimizer.step()
    return {
        **HEAD,
        "global_step": 7,
        "state_dict": copy.deepcopy(Holder(model).state_dict()),
        "loops": {"fit_loop": {"epoch_progress": {"current": {"ready": 1}}, "state_dict": {}}},
        "callbacks": {"HFCheckpoint": {"best_model_score": torch.tensor(0.1), "best_model_name": "checkpoint-5"}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 7, "_last_lr": [1e-3, 0.1 + 0.2]}],
        "rng": {"torch": torch.get_rng_state(), "python": random.getstate()},
        "odd": [float("nan"), float("-inf"), -0.0, 2**70, None, True, "caf\u00e9", (), {3: "three"}],
        "bf16": torch.tensor([1.0, 3.1415], dtype=torch.bfloat16),
    }


def bits_of(value):
    """Returns nested values with each tensor as (dtype, shape, bytes) and each float as hexadecimal text."""
    match value:
        case torch.Tensor():
            return str(value.dtype), tuple(value.shape), bytes(value.contiguous().flatten().view(torch.uint8).numpy())
        case dict():
            return {key: bits_of(one) for key, one in value.items()}
        case list() | tuple():
            return type(value)(map(bits_of, value))
        case float():
            return value.hex()
        case _:
            return value


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, tied):
    model = make_model(tied=tied, seed=0)
    checkpoint = lightning_checkpoint(model)
    before = bits_of(checkpoint)
    checkpoint_io(model).save_checkpoint(checkpoint, tmp_path / "checkpoint-7")
    assert bits_of(checkpoint) == before  # saving changes nothing of it
    again = checkpoint_io(make_model(tied=tied, seed=1)).load_checkpoint(tmp_path / "checkpoint-7")
    assert bits_of(again) == before


@pytest.mark.parametrize(("tied", "num_stored"), [(True, 26), (False, 27)])
def test_weights_are_stored_once_and_load_strictly(tmp_path, tied, num_stored):
    model = make_model(tied=tied, seed=0)
    checkpoint_io(model).save_checkpoint(lightning_checkpoint(model), tmp_path / "checkpoint-7")
    stored = load_file(tmp_path / "checkpoint-7" / "model.safetensors")
    assert len(stored) == num_stored  # two layers of twelve, the embedding, the last norm; the head where it is its own
    assert ("lm_head.weight" in stored) is not tied
    state = torch.load(tmp_path / "checkpoint-7" / "trainer_state.ckpt", weights_only=True)
    assert "state_dict" not in state
    other = make_model(tied=tied, seed=1)
    weights = checkpoint_io(other).load_checkpoint(tmp_path / "checkpoint-7")["state_dict"]
    Holder(other).load_state_dict(weights, strict=True)
    ids = torch.tensor([[1, 2, 5]])
    assert torch.equal(other(ids).logits, model(ids).logits)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-7")
    assert torch.equal(plain(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype(tmp_path, dtype):
    model = make_model(tied=True, seed=0).to(dtype)
    checkpoint = {**HEAD, "state_dict": Holder(model).state_dict(), "global_step": 1}
    checkpoint_io(model).save_checkpoint(checkpoint, tmp_path / "checkpoint-1")
    again = checkpoint_io(make_model(tied=True, seed=1).to(dtype)).load_checkpoint(tmp_path / "checkpoint-1")
    assert bits_of(again) == bits_of(checkpoint)


@pytest.mark.parametrize(("append_eos", "stop"), [(True, 0), (False, 3)])
def test_the_saved_model_has_tokenizer_and_supervised_eos(tmp_path, model_folder, append_eos, stop):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = make_model(tied=True, seed=0, vocabulary_size=len(tokenizer))
    io = checkpoint_io(model, datamodule=SimpleNamespace(tokenizer=tokenizer, append_eos=append_eos))
    io.save_checkpoint({"state_dict": Holder(model).state_dict(), "global_step": 1}, tmp_path / "checkpoint-1")
    assert json.loads((tmp_path / "checkpoint-1" / "generation_config.json").read_text())["eos_token_id"] == stop
    assert model.generation_config.eos_token_id == 3
    again = AutoTokenizer.from_pretrained(tmp_path / "checkpoint-1")
    assert again("2+2 is 4")["input_ids"] == tokenizer("2+2 is 4")["input_ids"]


def test_storage_options_are_the_manifest(tmp_path):
    model = make_model(tied=True, seed=0)
    checkpoint = {"state_dict": Holder(model).state_dict(), "global_step": 7}
    io = checkpoint_io(model)
    io.save_checkpoint(checkpoint, tmp_path / "checkpoint-7")
    io.save_checkpoint(checkpoint, str(tmp_path / "best"), storage_options={"step": 7, "val/loss": 0.5})
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("checkpoint-7", "best")]
    files = [manifest.pop("files") for manifest in manifests]
    assert manifests == [{"step": 7}, {"step": 7, "val/loss": 0.5}]
    assert (
        sorted(files[0])
        == sorted(files[1])
        == ["config.json", "generation_config.json", "model.safetensors", "trainer_state.ckpt"]
    )
    assert files[0]["model.safetensors"] == files[1]["model.safetensors"]


def test_a_link_is_followed_and_remove_deletes(tmp_path):
    model = make_model(tied=True, seed=0)
    io = checkpoint_io(model)
    io.save_checkpoint({**HEAD, "state_dict": Holder(model).state_dict(), "global_step": 7}, tmp_path / "checkpoint-7")
    (tmp_path / "last").symlink_to("checkpoint-7")
    assert io.load_checkpoint(tmp_path / "last")["global_step"] == 7
    io.remove_checkpoint(tmp_path / "checkpoint-7")
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


# Folders that something else wrote


@pytest.mark.parametrize("during", ["validate", "test", "predict"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["5GB", "1KB"])
def test_a_plain_model_folder_suffices_except_for_training(tmp_path, during, tied, shard_size):
    model = make_model(tied=tied, seed=0)
    model.save_pretrained(tmp_path / "plain", max_shard_size=shard_size)
    assert (tmp_path / "plain" / "model.safetensors.index.json").is_file() is (shard_size == "1KB")
    checkpoint = checkpoint_io(make_model(tied=tied, seed=1), during=during).load_checkpoint(tmp_path / "plain")
    assert bits_of(checkpoint.pop("state_dict")) == bits_of(Holder(model).state_dict())
    assert checkpoint["epoch"] == checkpoint["global_step"] == 0
    with pytest.raises(UserError, match=r"^--ckpt_path '.*plain' holds a model and no trainer_state\.ckpt, .*'$"):
        checkpoint_io(model, during="fit").load_checkpoint(tmp_path / "plain")


def test_weights_with_other_file_names_are_ignored(tmp_path):
    model = make_model(tied=False, seed=0)
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no weights at all")
    weights = checkpoint_io(make_model(tied=False, seed=1), during="validate").load_checkpoint(tmp_path)["state_dict"]
    assert bits_of(weights) == bits_of(Holder(model).state_dict())


def test_a_folder_without_weights_is_one_line(tmp_path):
    for path, reason in ((tmp_path, "holds no model"), (tmp_path / "absent", "is not a folder")):
        with pytest.raises(UserError, match=rf"^--ckpt_path '{path}' {reason}.*$"):
            checkpoint_io(make_model(tied=True, seed=0), during="validate").load_checkpoint(path)


# model in the folder, model of the run, first weight in which they differ
OTHER_MODELS = [
    ({"tied": True, "vocabulary_size": 13}, {"tied": True}, "lm_head.weight"),
    ({"tied": True}, {"tied": False}, "lm_head.weight"),
    ({"tied": True, "num_layers": 1}, {"tied": True, "num_layers": 2}, "model.layers.1.input_layernorm.weight"),
    ({"tied": True, "num_layers": 3}, {"tied": True, "num_layers": 2}, "model.layers.2.input_layernorm.weight"),
]


@pytest.mark.parametrize(("other", "own", "name"), OTHER_MODELS)
def test_another_models_weights_are_one_line(tmp_path, other, own, name):
    make_model(seed=0, **other).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^--ckpt_path '{tmp_path}' holds another model .* differ in {name}$"):
        checkpoint_io(make_model(seed=0, **own), during="validate").load_checkpoint(tmp_path)


# Damage and malice


FILES = ["config.json", "generation_config.json", "model.safetensors", "trainer_state.ckpt"]


@pytest.fixture
def saved(tmp_path):
    model = make_model(tied=True, seed=0)
    checkpoint_io(model).save_checkpoint(lightning_checkpoint(model), tmp_path / "checkpoint-7")
    return tmp_path / "checkpoint-7"


@pytest.mark.parametrize("during", ["fit", "validate"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_file_is_named(saved, during, name, damage):
    path = saved / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
        reason = "is missing"
    elif damage == "cut":
        path.write_bytes(content[:-1])
        reason = f"has {len(content) - 1} of {len(content)} bytes"
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        reason = "does not match its sha256"
    with pytest.raises(UserError) as error:
        checkpoint_io(make_model(tied=True, seed=1), during=during).load_checkpoint(saved)
    assert str(error.value) == f"checkpoint '{saved}' is damaged: {name} {reason}"


def test_trainer_state_without_a_manifest_is_not_trusted(saved):
    (saved / "manifest.json").unlink()
    for during in ("fit", "validate"):
        with pytest.raises(UserError, match=r"has no readable manifest\.json"):
            checkpoint_io(make_model(tied=True, seed=1), during=during).load_checkpoint(saved)


def test_a_cut_plain_folder_names_the_file(tmp_path):
    model = make_model(tied=True, seed=0)
    model.save_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 500)
    with pytest.raises(UserError, match=rf"^checkpoint '{tmp_path}' is damaged: model\.safetensors cannot be read: "):
        checkpoint_io(model, during="validate").load_checkpoint(tmp_path)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def forge(folder, content):
    """Replaces the trainer state, and its size and sha256 in the manifest."""
    (folder / "trainer_state.ckpt").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    described = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"]["trainer_state.ckpt"] = described
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("weights_only", [None, True, False])
@pytest.mark.parametrize("form", ["torch.save", "nested", "pickle", "legacy"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_malicious_pickle_is_refused_and_never_executed(saved, tmp_path, form, weights_only):
    proof = tmp_path / "executed"
    malicious = Malicious(proof)
    if form == "pickle":
        (tmp_path / "state").write_bytes(pickle.dumps(malicious))
    elif form == "nested":
        torch.save({"global_step": 7, "callbacks": {"x": [1, malicious]}}, tmp_path / "state")
    else:
        torch.save(malicious, tmp_path / "state", _use_new_zipfile_serialization=form != "legacy")
    content = (tmp_path / "state").read_bytes()
    # The file would do it, if it were let.
    if form == "pickle":
        pickle.loads(content)
    else:
        torch.load(tmp_path / "state", weights_only=False)
    proof.rmdir()

    forge(saved, content)
    with pytest.raises(UserError) as error:
        checkpoint_io(make_model(tied=True, seed=1)).load_checkpoint(saved, weights_only=weights_only)
    assert not proof.exists()
    assert str(error.value) == (
        f"checkpoint '{saved}': trainer_state.ckpt holds something else than tensors and plain values, "
        "or is damaged; it is not loaded"
    )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80", b"not a checkpoint" * 100, bytes(1000)])
def test_an_unreadable_trainer_state_is_one_line(saved, content):
    forge(saved, content)
    with pytest.raises(UserError, match=r"trainer_state\.ckpt holds something else .*; it is not loaded$"):
        checkpoint_io(make_model(tied=True, seed=1)).load_checkpoint(saved)


def test_validation_does_not_even_open_the_trainer_state(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("opened")

    monkeypatch.setattr(torch, "load", refuse)
    checkpoint = checkpoint_io(make_model(tied=True, seed=1), during="validate").load_checkpoint(saved)
    assert "optimizer_states" not in checkpoint
