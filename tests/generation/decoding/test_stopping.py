import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft_lightning.generation.decoding.stopping import StopCondition, cut_at_stop_string


@pytest.mark.parametrize(
    ("text", "cut"),
    [("a b", None), ("a</s> b</s>", "a</s>"), ("a END </s>", "a END"), ("</s>", "</s>"), ("", None)],
)
def test_text_is_cut_after_the_stop_string_that_ends_first(text, cut):
    assert cut_at_stop_string(text, ["</s>", "END"]) == cut


def end_of(tokenizer, stop_strings, eos_token_ids=(), max_new_tokens=1000):
    return StopCondition(
        tokenizer, stop_strings=stop_strings, eos_token_ids=eos_token_ids, max_new_tokens=max_new_tokens
    )


@pytest.fixture(scope="module")
def spaced_tokenizer():
    """Spaces are part of the tokens, as in SentencePiece, and a letter that is not a token becomes bytes."""
    letters = ["\u2581", "a", "b", "<", ">", "\u2581a", "b>", ">\u2581"]
    tokens = ["<unk>", *letters, *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def plain_end(tokenizer, tokens, stop_strings):
    """Returns after how many tokens the whole text first holds a stop string, None if never."""
    for num_tokens in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:num_tokens], clean_up_tokenization_spaces=False)
        if any(stop in text for stop in stop_strings):
            return num_tokens
    return None


@pytest.mark.parametrize("stop_strings", [("ab>",), ("\u00e9>",), ("> ", "ba"), ("<\u00e9",), ("a b",), (">",)])
@pytest.mark.parametrize("name", ["tokenizer", "spaced_tokenizer"])
def test_a_stop_string_ends_as_soon_as_it_is_complete(name, stop_strings, request):
    tokenizer = request.getfixturevalue(name)
    generator = random.Random(0)
    pieces = ["a", "b", "<", ">", " ", " a", "b>", "\u00e9", "<\u00e9", "ab"]
    found = 0
    for _ in range(150):
        text = "".join(generator.choice(pieces) for _ in range(20))
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        end = end_of(tokenizer, stop_strings)
        expected = plain_end(tokenizer, tokens, stop_strings)
        got = next((n for n in range(1, len(tokens) + 1) if end.reason(tokens[:n]) == "stop_string"), None)
        assert got == expected
        found += expected is not None
    assert found > 10


def test_a_stop_string_over_several_tokens_and_inside_of_one(tokenizer):
    end = end_of(tokenizer, ("</answer>",))
    tokens = tokenizer("4 </answer>")["input_ids"]
    assert len(tokens) > 2
    assert [end.reason(tokens[: n + 1]) for n in range(len(tokens))] == [None] * (len(tokens) - 1) + ["stop_string"]
    assert end.text(tokens, "stop_string") == "4 </answer>"
    cut = end_of(tokenizer, ("thi",))
    (thinking,) = tokenizer("think")["input_ids"][:1]
    assert tokenizer.decode([thinking]).startswith("th")
    assert cut.text(tokenizer("think")["input_ids"], "stop_string") == "thi"


def test_eos_and_the_limit(tokenizer):
    end = end_of(tokenizer, ("z",), eos_token_ids={0}, max_new_tokens=3)
    one, two = tokenizer("1")["input_ids"][0], tokenizer("2")["input_ids"][0]
    assert end.reason([one]) is None
    assert end.reason([one, two]) is None
    assert end.reason([one, two, one]) == "length"
    assert end.reason([one, 0]) == "eos"
    assert end.reason([one, two, 0]) == "eos"
    assert end.text([one, two, one], "length") == "121"
    assert end.text([one, 0], "eos") == "1"


def test_few_tokens_are_decoded_at_all(tokenizer, monkeypatch):
    end = end_of(tokenizer, ("</answer>",))
    letter, closing = tokenizer("q")["input_ids"][0], tokenizer(">")["input_ids"][0]
    end.reason([letter])
    end.reason([closing])
    decoded = []
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, tokens, **_: decoded.append(tokens) or "")
    for _ in range(5):
        end.reason([letter, letter])
    end.reason([letter, closing])
    assert decoded == [[letter, closing]]
