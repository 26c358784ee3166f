import logging

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from sft_lightning.generation import transformers_generator
from sft_lightning.generation.decoding.loop import decoding_obstacle
from sft_lightning.generation.transformers_generator import TransformersGenerator

PROMPTS = ["1+1=", "What is seven times eight? ", "x", "The number after 41 is ", "a b c d", "1+1="]


@pytest.fixture(params=["sliding window", "state space"])
def model(request, tokenizer):
    torch.manual_seed(0)
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 1, "bos_token_id": None, "eos_token_id": None}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
    if request.param == "state space":
        return MambaForCausalLM(MambaConfig(**tokens, **shape, state_size=8)).eval()
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 8}
    return MistralForCausalLM(MistralConfig(**tokens, **shape, **heads)).eval()


def answer_by_a_plain_loop(model, tokenizer, prompt, max_new_tokens):
    tokens = tokenizer(prompt)["input_ids"]
    answer, entropies = [], []
    while len(answer) < max_new_tokens and tokenizer.eos_token_id not in answer:
        with torch.no_grad():
            logits = model(torch.tensor([tokens + answer]), use_cache=False).logits[0, -1].double()
        answer.append(int(logits.argmax()))
        entropies.append(float(torch.distributions.Categorical(logits=logits).entropy()))
    return answer, sum(entropies) / len(entropies)


def test_greedy_answers_equal_a_plain_loop(model, tokenizer):
    assert decoding_obstacle(model) is not None
    for rows in (1, 4):
        generator = TransformersGenerator(greedy=True, max_new_tokens=16, stop_strings=(), batch_tokens=rows * 40)
        for prompt, generation in zip(PROMPTS, generator.generate(model, tokenizer, PROMPTS), strict=True):
            tokens, entropy = answer_by_a_plain_loop(model, tokenizer, prompt, 16)
            assert generation.num_tokens == len(tokens)
            text = tokenizer.decode(tokens[:-1] if generation.stop_reason == "eos" else tokens)
            assert generation.text == text
            assert generation.mean_entropy == pytest.approx(entropy, rel=1e-4)


def test_samples_follow_from_seed_and_number_alone(model, tokenizer):
    def texts(prompts, numbers, rows):
        generator = TransformersGenerator(max_new_tokens=16, seed=3, top_p=0.95, batch_tokens=rows * 40)
        return [each.text for each in generator.generate(model, tokenizer, prompts, numbers=numbers)]

    together = texts(PROMPTS, range(6), 16)
    assert together[0] != together[5]
    assert texts(PROMPTS, None, 1) == together
    assert texts([PROMPTS[4], PROMPTS[0]], [4, 0], 4) == [together[4], together[0]]


def test_what_rules_out_the_faster_loop_is_told_once(model, tokenizer, caplog):
    transformers_generator._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="sft_lightning"):
        for _ in range(2):
            TransformersGenerator(greedy=True, max_new_tokens=2).generate(model, tokenizer, PROMPTS)
    reason = {
        "MistralForCausalLM": "its state is not the keys and values of all tokens",
        "MambaForCausalLM": "its forward takes no position_ids",
    }[type(model).__name__]
    assert caplog.messages == [
        f"generation: {type(model).__name__} uses `generate` of transformers, which takes longer than the "
        f"decoding loop of this package, because {reason}"
    ]


def test_the_models_settings_stay_after_an_error(model, tokenizer, monkeypatch):
    def fail(**kwargs):
        raise RuntimeError("broken")

    own = model.generation_config
    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="broken"):
        TransformersGenerator(greedy=True).generate(model, tokenizer, PROMPTS)
    assert model.generation_config is own
