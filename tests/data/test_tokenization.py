"""Compare token ids with literals, for a whole-word tokenizer and a byte-level BPE trained here."""

import json
import threading

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, Qwen2Config

from sft_lightning.data import tokenization
from sft_lightning.data.formats.base import Record
from sft_lightning.data.load_report import LoadReport
from sft_lightning.data.settings import DataSettings
from sft_lightning.data.tokenization import (
    encode_prompts,
    encode_responses,
    load_tokenizer,
    pad_token_id,
    tokenize_prompt_and_output,
    tokenize_records,
    tokenizer_fingerprint,
    truncate_prompt,
    wants_bos,
)
from sft_lightning.errors import UserError

PAD, BOS, EOS = 0, 1, 2
VOCABULARY = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "one": 3, "two": 4, "plus": 5, "is": 6, "three": 7, "?": 8}


def word_tokenizer(*, adds_bos=False, adds_eos=False, **special_tokens):
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = ["<s>"] * adds_bos + ["$A"] + ["</s>"] * adds_eos
    if len(template) > 1:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(template), special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)


PLAIN = word_tokenizer(pad_token="<pad>", eos_token="</s>")
WITH_BOS = word_tokenizer(adds_bos=True, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
BARE = word_tokenizer()


@pytest.fixture(scope="module")
def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    backend.train_from_iterator(["two plus two is four </think> <answer> 4 </answer>"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


# Prompts and responses


def test_prompts_get_no_bos_if_the_tokenizer_adds_none():
    assert not wants_bos(PLAIN)
    assert encode_prompts(PLAIN, ["one plus two", "three"]) == [[3, 5, 4], [7]]


def test_prompts_get_one_bos_if_the_tokenizer_adds_one():
    assert wants_bos(WITH_BOS)
    assert encode_prompts(WITH_BOS, ["one plus two", "three"]) == [[BOS, 3, 5, 4], [BOS, 7]]


def test_a_prompt_that_begins_with_bos_gets_no_second_one(note_fault):
    assert encode_prompts(WITH_BOS, ["<s> one", "one <s>"]) == [[BOS, 3], [BOS, 3, BOS]]
    note_fault(
        "prompt that begins with BOS",
        provoked="a tokenizer that adds BOS, and prompts that hold one",
        outcome="one BOS at the front; prompt and response are tokenized apart, so no token spans their boundary",
        tries=2,
    )


@pytest.mark.parametrize(
    "tokenizer",
    [
        word_tokenizer(bos_token="<s>", eos_token="</s>"),  # has one, does not add it
        word_tokenizer(adds_eos=True, eos_token="</s>"),
        word_tokenizer(adds_eos=True, bos_token="</s>", eos_token="</s>"),  # one token for both ends, put at the end
    ],
)
def test_prompts_get_no_eos_and_no_unused_bos(tokenizer):
    assert not wants_bos(tokenizer)
    assert encode_prompts(tokenizer, ["one"]) == [[3]]


def test_responses_end_with_one_eos_and_have_no_bos():
    assert encode_responses(WITH_BOS, ["is three", "is </s>"], append_eos=True) == [[6, 7, EOS], [6, EOS]]
    assert encode_responses(WITH_BOS, ["is three"], append_eos=False) == [[6, 7]]


def test_text_that_spells_a_special_token_becomes_it(byte_level):
    end = byte_level.eos_token_id
    prompt = encode_prompts(byte_level, ["a<|end|>b"])[0]
    assert prompt.count(end) == 1
    assert len(prompt) == 3


def test_append_eos_without_an_eos_is_an_error():
    with pytest.raises(UserError, match=r"no EOS token for data\.append_eos"):
        encode_responses(BARE, ["is"], append_eos=True)
    assert encode_responses(BARE, ["is"], append_eos=False) == [[6]]


def test_no_texts_give_no_rows():
    assert encode_prompts(WITH_BOS, []) == []
    assert encode_responses(PLAIN, [], append_eos=True) == []


def test_pad_token_falls_back_to_eos_then_zero():
    assert pad_token_id(word_tokenizer(pad_token="?", eos_token="</s>")) == 8
    assert pad_token_id(word_tokenizer(eos_token="</s>")) == EOS
    assert pad_token_id(BARE) == 0


def test_any_text_survives_a_round_trip(byte_level):
    texts = ["2 + 2 = 4, \u00e9t\u00e9 \U0001f600\n\t{x}", " two plus two"]
    assert [byte_level.decode(row) for row in encode_prompts(byte_level, texts)] == texts


@pytest.mark.parametrize("splits_special_tokens", [False, True])
def test_ids_equal_those_of_the_tokenizers_own_call(byte_level, splits_special_tokens):
    texts = ["two plus two", " two <|end|> two", "\u00e9t\u00e9 \U0001f600\r\n\t{x}", "<|end|>", "a" * 5000]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level.backend_tokenizer,
        eos_token="<|end|>",
        split_special_tokens=splits_special_tokens,
    )
    own = tokenizer(texts, add_special_tokens=False, split_special_tokens=splits_special_tokens)["input_ids"]
    # Somebody's call left this behind.
    tokenizer.backend_tokenizer.encode_special_tokens = not splits_special_tokens
    assert encode_prompts(tokenizer, texts) == own
    assert (tokenizer.eos_token_id in own[1]) is not splits_special_tokens


def test_earlier_padding_and_truncation_change_no_ids():
    tokenizer = word_tokenizer(eos_token="</s>", pad_token="<pad>")
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["one", "one two"], padding=True, truncation=True, max_length=1)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert encode_prompts(tokenizer, ["one plus two"]) == [[3, 5, 4]]


# The guide's function


def test_prompt_and_output_are_joined_and_shifted():
    tensors = tokenize_prompt_and_output(["one plus two", "two"], ["is three", "is"], PLAIN)
    expected = {
        # one plus two is three; two is <pad> <pad> <pad>
        "input_ids": torch.tensor([[3, 5, 4, 6], [4, 6, PAD, PAD]]),
        "labels": torch.tensor([[5, 4, 6, 7], [6, PAD, PAD, PAD]]),
        "response_mask": torch.tensor([[False, False, True, True], [True, False, False, False]]),
    }
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def test_prompt_and_output_begin_with_bos():
    tensors = tokenize_prompt_and_output(["one"], ["is three"], WITH_BOS)
    assert tensors["input_ids"].tolist() == [[BOS, 3, 6]]
    assert tensors["labels"].tolist() == [[3, 6, 7]]
    assert tensors["response_mask"].tolist() == [[False, True, True]]


def test_response_mask_goes_by_position_if_padding_is_eos():
    tokenizer = word_tokenizer(eos_token="</s>")
    tensors = tokenize_prompt_and_output(["one", "one"], ["</s>", "two three"], tokenizer)
    assert tensors["labels"].tolist() == [[EOS, EOS], [4, 7]]
    assert tensors["response_mask"].tolist() == [[True, False], [True, True]]


def test_an_empty_output_has_an_empty_mask():
    tensors = tokenize_prompt_and_output(["one two", "one"], ["", "two"], BARE)
    assert tensors["labels"].tolist() == [[4], [4]]
    assert tensors["response_mask"].tolist() == [[False], [True]]


@pytest.mark.parametrize(("prompts", "outputs"), [(["one"], []), ([], []), (["one"], ["is", "is"])])
def test_prompts_and_outputs_must_pair_up(prompts, outputs):
    with pytest.raises(UserError, match=f"got {len(prompts)} prompt_strs and {len(outputs)} output_strs"):
        tokenize_prompt_and_output(prompts, outputs, PLAIN)


# Records


def encoded(records, tokenizer=WITH_BOS, *, append_eos=True):
    settings = DataSettings("rows.jsonl", max_length=99, overlength="error", append_eos=append_eos)
    return map(prompt_and_response, tokenize_records(iter(records), tokenizer, settings, LoadReport()))


def prompt_and_response(row):
    """A row's record, the ids of its prompt and those of its response."""
    record, example = row
    (sequence,) = example.sequences
    assert example.source == record.source
    assert sequence.tokens.dtype == np.int32
    assert sequence.label_spans == ((len(sequence.prefix), len(sequence.tokens), 1.0),)
    return record, sequence.prefix.tolist(), sequence.tokens[len(sequence.prefix) :].tolist()


def test_a_prompt_with_several_responses_is_encoded_once(monkeypatch):
    prompts = []

    def encode_and_note(tokenizer, texts):
        prompts.extend(texts)
        return encode_prompts(tokenizer, texts)

    monkeypatch.setattr(tokenization, "encode_prompts", encode_and_note)
    records = [Record("one", "two"), Record("two", "three"), Record("one", "is"), Record("one", "two")]
    rows = [(prompt, response) for _, prompt, response in encoded(records)]
    assert rows == [
        ([BOS, 3], [4, EOS]),
        ([BOS, 4], [7, EOS]),
        ([BOS, 3], [6, EOS]),
        ([BOS, 3], [4, EOS]),
    ]
    assert prompts == ["one", "two"]


def test_rows_are_read_ahead_and_stay_in_order(monkeypatch):
    has_read_on = threading.Event()

    def read():
        for line in range(1, 2501):
            if line == 1500:
                has_read_on.set()
            yield Record("one" if line % 2 else "two", "is", source=f"a:{line}")

    def encode_when_read_on(tokenizer, texts):
        assert has_read_on.wait(timeout=60), "nothing was read while the first chunk was encoded"
        return encode_prompts(tokenizer, texts)

    monkeypatch.setattr(tokenization, "encode_prompts", encode_when_read_on)
    rows = list(encoded(read()))
    assert [record.source for record, _, _ in rows] == [f"a:{line}" for line in range(1, 2501)]
    assert [prompt for _, prompt, _ in rows] == [[BOS, 3], [BOS, 4]] * 1250


def test_errors_in_reading_or_encoding_reach_the_caller():
    def read():
        yield from [Record("one", "two")] * 2000
        raise UserError("a:2001 is bad")

    with pytest.raises(UserError, match="a:2001 is bad"):
        list(encoded(read()))
    with pytest.raises(UserError, match=r"no EOS token for data\.append_eos"):
        list(encoded([Record("one", "two")], BARE))
    assert [response for _, _, response in encoded([Record("one", "two")], BARE, append_eos=False)] == [[4]]


# Length

LONG = Record("one plus two plus one", "is three", source="a:1")  # 5 + 2 tokens, and BOS and EOS
SHORT = Record("one", "is", source="a:2")


def tokenized(records, tokenizer, max_length, overlength):
    load_report, settings = LoadReport(), DataSettings("rows.jsonl", max_length=max_length, overlength=overlength)
    rows = map(prompt_and_response, tokenize_records(iter(records), tokenizer, settings, load_report))
    return [(record.source, prompt, response) for record, prompt, response in rows], load_report


def test_a_row_of_exactly_max_length_fits():
    rows, load_report = tokenized([LONG], WITH_BOS, 9, "error")
    assert rows == [("a:1", [BOS, 3, 5, 4, 5, 3], [6, 7, EOS])]
    assert load_report == LoadReport()


def test_an_overlong_row_is_dropped_and_reported():
    rows, load_report = tokenized([LONG, SHORT], WITH_BOS, 8, "drop")
    assert rows == [("a:2", [BOS, 3], [6, EOS])]
    assert (load_report.overlength_rows.count, load_report.overlength_rows.first) == (1, [("a:1", "9 tokens")])


def test_an_overlong_row_is_an_error_under_error():
    message = r"rows over data\.max_length 3 \(2\): a:1: 9 tokens; a:2: 4 tokens\. Raise it, or set data\.overlength"
    with pytest.raises(UserError, match=message):
        tokenized([LONG, SHORT], WITH_BOS, 3, "error")


@pytest.mark.parametrize(
    ("tokenizer", "max_length", "prompt"),
    [
        (WITH_BOS, 8, [BOS, 5, 4, 5, 3]),
        (WITH_BOS, 5, [BOS, 3]),
        (WITH_BOS, 4, None),  # BOS alone is not a prompt
        (PLAIN, 7, [5, 4, 5, 3]),
        (PLAIN, 4, [3]),
        (PLAIN, 3, None),  # the response fills the row
        (PLAIN, 2, None),
    ],
)
def test_prompts_are_cut_from_the_left_and_responses_never(tokenizer, max_length, prompt):
    rows, load_report = tokenized([LONG], tokenizer, max_length, "truncate_prompt")
    if prompt is None:
        assert rows == []
        assert (load_report.overlength_rows.count, load_report.truncated_prompts) == (1, 0)
    else:
        assert rows == [("a:1", prompt, [6, 7, EOS])]
        assert (load_report.overlength_rows.count, load_report.truncated_prompts) == (0, 1)


def test_a_prompt_that_fits_is_not_truncated():
    assert truncate_prompt(PLAIN, [3, 4], 2) == [3, 4]
    assert truncate_prompt(WITH_BOS, [BOS], 0) == [BOS]


def test_text_without_tokens_is_a_bad_row():
    backend = Tokenizer(models.WordLevel({"one": 0, "?": 1}, unk_token="?"))
    backend.normalizer = normalizers.Replace("two", "")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    load_report = LoadReport()
    records = [
        Record("one", "two", source="a:1"),
        Record("two", "one", source="a:2"),
        Record("one", "one", source="a:3"),
    ]
    settings = DataSettings("rows.jsonl", max_length=9, append_eos=False)
    rows = tokenize_records(iter(records), tokenizer, settings, load_report)
    assert [record.source for record, _ in rows] == ["a:3"]
    assert load_report.bad_rows.first == [
        ("a:1", "the response has no tokens"),
        ("a:2", "the prompt has no tokens"),
    ]


# Loading and identity


def test_a_saved_tokenizer_keeps_its_fingerprint(tmp_path):
    WITH_BOS.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert encode_prompts(loaded, ["one plus"]) == [[BOS, 3, 5]]
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(WITH_BOS)


def test_fingerprints_differ_if_ids_would(byte_level):
    tokenizers = [PLAIN, WITH_BOS, BARE, byte_level, word_tokenizer(eos_token="?", pad_token="<pad>"), ByT5Tokenizer()]
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers}) == len(tokenizers)
    assert tokenizer_fingerprint(ByT5Tokenizer()) == tokenizer_fingerprint(ByT5Tokenizer())


def test_an_added_token_changes_the_fingerprint():
    tokenizer = word_tokenizer(eos_token="</s>")
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.add_tokens(["four"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_a_slow_tokenizer_works():
    assert encode_prompts(ByT5Tokenizer(), ["ab"]) == [[100, 101]]  # ByT5: byte + 3
    assert encode_responses(ByT5Tokenizer(), ["b"], append_eos=True) == [[101, 1]]


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(UserError, match=f"no tokenizer '{tmp_path}' in the folder"):
        load_tokenizer(str(tmp_path))


def test_a_model_config_alone_is_not_a_tokenizer(tmp_path):
    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"tokenizer path '{tmp_path}' holds no vocabulary"):
        load_tokenizer(str(tmp_path))


def test_a_damaged_tokenizer_file_is_an_error(tmp_path):
    PLAIN.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(UserError, match=f"no tokenizer '{tmp_path}' in the folder") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_tokenizer_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match="it is not a local folder and the hub did not provide it"):
        load_tokenizer(str(tmp_path / "missing"))
    file = tmp_path / "tokenizer.json"
    file.touch()
    with pytest.raises(UserError, match="is a file; give the folder that holds it"):
        load_tokenizer(str(file))


def test_code_in_a_tokenizer_folder_is_not_run(tmp_path):
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()
