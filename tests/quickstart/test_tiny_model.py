import sys
import unicodedata

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_lightning.quickstart.tiny_model import train_tokenizer, write_tiny_model

FIXED_TEXTS = ("Read the question, think, and answer.\nUser:", "\nAssistant: <think>")
TEXTS = [
    "Read the question, think, and answer.\nUser: Ada has 12 apples and finds 7 more.\nAssistant: <think>",
    " 12+7=19. </think> <answer> 19 </answer>",
] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_tiny_model(folder, TEXTS, fixed_texts=FIXED_TEXTS)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_the_folder_loads_as_a_tiny_qwen2_model(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "qwen2"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # A layer: attention 4 x 128 x 128 and 3 biases, three matrices of 128 x 384, two norms. Then embedding and norm.
    layer = 4 * 128 * 128 + 3 * 128 + 3 * 128 * 384 + 2 * 128
    assert model.num_parameters() == 2 * layer + len(tokenizer) * 128 + 128
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert not (folder / "pytorch_model.bin").exists()


def test_the_model_generates(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    batch = tokenizer(["Ada has 12", "Ada"], return_tensors="pt", padding=True)
    assert model.generate(**batch, max_new_tokens=2, min_new_tokens=2).shape[1] == batch["input_ids"].shape[1] + 2


def test_special_tokens(tokenizer):
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token is None


def test_every_digit_is_a_token(tokenizer):
    text = "1212121999 19+7=26"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert [tokenizer.decode([token]) for token in ids] == list(text)


def test_a_fixed_text_is_one_token(tokenizer):
    ids = tokenizer(TEXTS[0], add_special_tokens=False).input_ids
    pieces = [tokenizer.decode([token]) for token in ids]
    assert pieces[0] == FIXED_TEXTS[0]
    assert pieces[-1] == FIXED_TEXTS[1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXTS[0]


def test_the_loaded_tokenizer_is_the_trained_one(tokenizer):
    trained = train_tokenizer(TEXTS, fixed_texts=FIXED_TEXTS)
    for text in [*TEXTS, "Zoe  can't\r\n\t buy 3 kites!?"]:
        assert tokenizer(text).input_ids == trained(text).input_ids


def test_every_character_decodes_to_itself(tokenizer):
    # One per line, so that no character is next to one it could compose with.
    characters = [
        character
        for character in map(chr, range(sys.maxunicode + 1))
        if unicodedata.category(character) not in {"Cs", "Cn", "Co"} and unicodedata.is_normalized("NFC", character)
    ]
    text = "\n".join(characters)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_decomposed_text_comes_back_composed(tokenizer):
    assert tokenizer.decode(tokenizer("cafe\u0301").input_ids) == "caf\u00e9"


def test_equal_arguments_give_equal_files_and_keep_the_random_state(folder, tmp_path):
    before = torch.get_rng_state()
    write_tiny_model(tmp_path / "same", TEXTS, fixed_texts=FIXED_TEXTS)
    write_tiny_model(tmp_path / "other", TEXTS, fixed_texts=FIXED_TEXTS, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for path in folder.iterdir():
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
    weights = "model.safetensors"
    assert (tmp_path / "other" / weights).read_bytes() != (folder / weights).read_bytes()
