"""Compare the loop with transformers' own ``generate``, and test the computation it saves."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sft_lightning.generation.decoding.hf_generate import HFGenerate
from sft_lightning.generation.decoding.kv_cache import KVCache
from sft_lightning.generation.decoding.loop import DecodingLoop, decoding_obstacle
from sft_lightning.generation.decoding.sampling import TokenSampler
from sft_lightning.generation.decoding.stopping import StopCondition
from sft_lightning.models.loading import load_model
from sft_lightning.models.precision import Precision

SMALL = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
MLP = {**SMALL, "intermediate_size": 48}
GROUPED = {**MLP, "num_key_value_heads": 2}
_GPT2_SIZES = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
_GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROTATION = {"rope_theta": 10000.0, "factor": 2.0}

LOOP = {
    "Qwen2": ("Qwen2Config", GROUPED),
    "Llama": ("LlamaConfig", GROUPED),
    "Llama, linearly stretched": ("LlamaConfig", {**GROUPED, "rope_parameters": {**_ROTATION, "rope_type": "linear"}}),
    "Qwen3-MoE": ("Qwen3MoeConfig", {**GROUPED, **_EXPERTS, "head_dim": 8}),
    "GPT-2": ("GPT2Config", {**_GPT2_SIZES, "bos_token_id": None, "eos_token_id": None}),
    "GPT-NeoX": ("GPTNeoXConfig", MLP),
    "OPT": ("OPTConfig", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1}),
    "Cohere": ("CohereConfig", {**GROUPED, "logit_scale": 0.25}),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        {**GROUPED, **_LATENT, **_GROUPS, "num_key_value_heads": 4, "moe_intermediate_size": 24},
    ),
}
_STATE = "its state is not the keys and values of all tokens"
_ATTENTION = "its attention is not behind transformers' interface"
_CHUNKED = {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8}
_HYBRID = {"shared_expert_intermediate_size": 24, "layer_types": ["linear_attention", "full_attention"]}
GENERATE = {
    "Mistral, windowed": ("MistralConfig", {**GROUPED, "sliding_window": 8}, _STATE),
    "Gemma 3": ("Gemma3TextConfig", {**GROUPED, **_TWO_KINDS, "head_dim": 8}, _STATE),
    "Llama 4": ("Llama4TextConfig", {**GROUPED, **_CHUNKED, "head_dim": 8}, _STATE),
    "Phi-3": ("Phi3Config", {**GROUPED, "sliding_window": None}, "it prepares its inputs itself"),
    "Llama, dynamic rotation": (
        "LlamaConfig",
        {**GROUPED, "rope_parameters": {**_ROTATION, "rope_type": "dynamic"}},
        "its rotary angles depend on the longest row",
    ),
    "BLOOM": (
        "BloomConfig",
        {"vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "its forward takes no position_ids",
    ),
    "Falcon": ("FalconConfig", {**SMALL, "multi_query": True}, _ATTENTION),
    "Mamba": ("MambaConfig", {**SMALL, "state_size": 8}, "its forward takes no position_ids"),
    "LFM2": ("Lfm2Config", {**GROUPED, "layer_types": ["conv", "full_attention"]}, _STATE),
    "Qwen3-Next": ("Qwen3NextConfig", {**GROUPED, **_EXPERTS, **_LINEAR, **_HYBRID, "head_dim": 8}, _ATTENTION),
}
GREEDY = {"greedy": True, "temperature": 1.0, "top_p": 1.0, "seed": 0}
PREFIX = list(range(40, 57))
PROMPTS = [[*PREFIX, *rest] for rest in ([7, 8, 9, 10, 11], [7], [12, 13], [7, 8, 9, 10, 12], [14])]


def make(config, options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**options), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # so that answers differ
            parameter += 0.15 * torch.randn_like(parameter)
    return model.eval()


def loop_of(model, tokenizer, prompts=PROMPTS, choice=GREEDY, **end):
    settings = {"stop_strings": ("7",), "eos_token_ids": {5}, "max_new_tokens": 12, **end}
    return DecodingLoop(model, prompts, TokenSampler(**choice), StopCondition(tokenizer, **settings), 1)


def by_transformers(model, prompt, max_new_tokens=12):
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


def shapes_of(model):
    """Returns a list of the shapes of input ids, filled with every forward pass."""
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("name", LOOP)
def test_families_of_full_attention_match_transformers_generate(name, tokenizer):
    model = make(*LOOP[name])
    assert decoding_obstacle(model) is None
    expected = [by_transformers(model, prompt) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) > 1
    answers = loop_of(model, tokenizer, stop_strings=(), eos_token_ids=()).answer(PROMPTS, range(5))
    assert [answer.tokens for answer in answers] == expected
    assert {answer.stop_reason for answer in answers} == {"length"}


@pytest.mark.parametrize("name", GENERATE)
def test_other_families_are_left_to_transformers_generate(name):
    config, options, obstacle = GENERATE[name]
    assert decoding_obstacle(make(config, options)) == obstacle


def test_a_model_without_our_cache_uses_transformers_generate(monkeypatch):
    class Forgetful(Qwen2ForCausalLM):
        def forward(
            self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs
        ):
            return super().forward(input_ids, attention_mask, position_ids, use_cache=False, **kwargs)

    config = Qwen2Config(**GROUPED)
    assert decoding_obstacle(Qwen2ForCausalLM(config)) is None
    assert decoding_obstacle(Forgetful(config)) == "it does not fill the cache that it is given"


class WithOldName(Qwen2ForCausalLM):
    """Names its cache as transformers did before 5.24."""

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs
    ):
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache, **kwargs)


class WithNewName(Qwen2ForCausalLM):
    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None, **kwargs):
        return super().forward(input_ids, attention_mask, position_ids, cache, use_cache=use_cache, **kwargs)


@pytest.mark.parametrize("kind", [WithOldName, WithNewName])
def test_a_cache_of_either_name_is_used(kind, tokenizer):
    plain = make(*LOOP["Qwen2"])
    model = kind(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    assert decoding_obstacle(model) is None
    answers = loop_of(model, tokenizer, stop_strings=(), eos_token_ids=()).answer(PROMPTS, range(5))
    assert [answer.tokens for answer in answers] == [by_transformers(plain, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("choice", [GREEDY, {"greedy": False, "temperature": 0.8, "top_p": 0.9, "seed": 3}])
def test_both_ways_give_the_same_answers(choice, tokenizer):
    model = make(*LOOP["Qwen2"])
    end = StopCondition(tokenizer, stop_strings=("e",), eos_token_ids={5}, max_new_tokens=40)
    answers = DecodingLoop(model, PROMPTS, TokenSampler(**choice), end, 1).answer(PROMPTS, [4, 3, 9, 0, 1])
    others = HFGenerate(model, TokenSampler(**choice), end, {5}, 1).answer(PROMPTS, [4, 3, 9, 0, 1])
    assert [(answer.tokens, answer.stop_reason) for answer in answers] == [
        (other.tokens, other.stop_reason) for other in others
    ]
    assert len({len(answer.tokens) for answer in answers}) > 2
    for answer, other in zip(answers, others, strict=True):
        assert answer.mean_entropy == pytest.approx(other.mean_entropy, rel=1e-4)


def test_common_prefix_and_equal_prompts_run_once(tokenizer):
    model = make(*LOOP["Qwen2"])
    shapes = shapes_of(model)
    prompts = [*PROMPTS, PROMPTS[0], PROMPTS[4]]
    loop = loop_of(model, tokenizer, prompts, stop_strings=(), eos_token_ids=(), max_new_tokens=3)
    answers = loop.answer(prompts[:4], range(4)) + loop.answer(prompts[4:], range(3))
    # The prefix; four prompts and two more tokens of each; then two different ones of three.
    assert shapes == [(1, 17), (4, 5), (4, 1), (4, 1), (2, 5), (3, 1), (3, 1)]
    assert answers[0].tokens == answers[5].tokens == by_transformers(model, PROMPTS[0], 3)
    assert answers[4].tokens == answers[6].tokens == by_transformers(model, PROMPTS[4], 3)


def test_prompts_of_a_kind_are_computed_together(tokenizer, monkeypatch):
    monkeypatch.setattr("sft_lightning.generation.decoding.loop._PART_TOKENS", 10)
    model = make(*LOOP["Qwen2"])
    shapes = shapes_of(model)
    answers = loop_of(model, tokenizer, stop_strings=(), eos_token_ids=(), max_new_tokens=12).answer(PROMPTS, range(5))
    assert shapes[:4] == [(1, 17), (2, 5), (3, 2), (5, 1)]
    assert [answer.tokens for answer in answers] == [by_transformers(model, prompt) for prompt in PROMPTS]


def test_prompts_without_anything_in_common(tokenizer):
    model = make(*LOOP["Qwen2"])
    prompts = [[3, 4, 5], [6], [7, 8]]
    shapes = shapes_of(model)
    answers = loop_of(model, tokenizer, prompts, stop_strings=(), eos_token_ids=()).answer(prompts, range(3))
    assert shapes[0] == (3, 3)
    assert [answer.tokens for answer in answers] == [by_transformers(model, prompt) for prompt in prompts]


def test_one_prompt_alone(tokenizer):
    model = make(*LOOP["Qwen2"])
    for prompt in (PROMPTS[0], [9]):
        answers = loop_of(model, tokenizer, [prompt], stop_strings=(), eos_token_ids=()).answer([prompt], [0])
        assert [answer.tokens for answer in answers] == [by_transformers(model, prompt)]


def test_rows_that_end_leave_the_batch_at_once(tokenizer):
    model = make(*LOOP["Qwen2"])
    expected = [by_transformers(model, prompt, 30) for prompt in PROMPTS]
    ending = {tokens[index] for index, tokens in zip((2, 4, 4, 9, 13), expected, strict=True)}
    lengths = [next(n for n, token in enumerate(tokens, 1) if token in ending) for tokens in expected]
    assert len(set(lengths)) > 2
    shapes = shapes_of(model)
    answers = loop_of(model, tokenizer, stop_strings=(), eos_token_ids=ending, max_new_tokens=30).answer(
        PROMPTS, range(5)
    )
    assert [answer.tokens for answer in answers] == [
        tokens[:length] for tokens, length in zip(expected, lengths, strict=True)
    ]
    assert {answer.stop_reason for answer in answers} == {"eos"}
    # Behind the prefix and the prompts, a pass holds the answers that are longer than it.
    assert shapes[2:] == [(sum(length > step for length in lengths), 1) for step in range(1, max(lengths))]


def test_entropy_is_the_mean_over_an_answers_tokens(tokenizer):
    model = make(*LOOP["Qwen2"])
    tokens = by_transformers(model, PROMPTS[1], 6)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[1] + tokens[:-1]])).logits[0, len(PROMPTS[1]) - 1 :].double()
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    answers = loop_of(model, tokenizer, stop_strings=(), eos_token_ids={tokens[3]}, max_new_tokens=6).answer(
        PROMPTS[:2], range(2)
    )
    num_tokens = tokens.index(tokens[3]) + 1
    assert answers[1].tokens == tokens[:num_tokens]
    assert answers[1].mean_entropy == pytest.approx(float(entropies[:num_tokens].mean()), rel=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_models_with_our_attention(model_folder, tokenizer, attention, precision):
    model = load_model(model_folder, attn_implementation=attention, precision=Precision.named(precision)).eval()
    assert decoding_obstacle(model) is None
    answers = loop_of(model, tokenizer, stop_strings=(), eos_token_ids=()).answer(PROMPTS[:1], [0])
    assert answers[0].tokens == by_transformers(model, PROMPTS[0])


def test_the_cache_is_in_the_precision_of_autocast(tokenizer, monkeypatch):
    model = make(*LOOP["Qwen2"])
    dtypes = set()
    model.model.layers[1].self_attn.register_forward_hook(
        lambda module, args, kwargs, output: dtypes.update(
            (layer.keys.dtype, layer.values.dtype)
            for value in kwargs.values()
            if isinstance(value, KVCache)
            for layer in value.layers
        ),
        with_kwargs=True,
    )
    loop_of(model, tokenizer).answer(PROMPTS, range(5))
    assert dtypes == {(torch.float32, torch.float32)}
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loop_of(model, tokenizer).answer(PROMPTS, range(5))
    assert dtypes == {(torch.bfloat16, torch.bfloat16)}
