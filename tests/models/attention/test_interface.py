"""Test each registered attention with and without segments."""

import copy

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, Gemma2Config, LlamaConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sft_lightning.data.batch import Segment, Segments
from sft_lightning.models.attention import interface
from sft_lightning.models.attention.interface import registered_name

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
TREE = [Segment(0, 6, -1), Segment(6, 10, 0), Segment(10, 15, 0)]


def make_model(config, attention):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32)


@pytest.mark.parametrize(
    ("config", "registered", "own"),
    [(LLAMA, "sft_segments", "sdpa"), (LLAMA, "sft_fa2", "sdpa"), (SOFT_CAPPED, "sft_segments_eager", "eager")],
)
def test_without_segments_it_is_transformers_own_attention(config, registered, own):
    ids = torch.arange(24).view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    outputs = []
    for attention in (registered, own):
        model = make_model(config, attention).eval()
        logits = model(input_ids=ids, attention_mask=mask).logits
        answers = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
        outputs.append((logits, answers))
        assert "sft_" not in model.config.to_json_string(use_diff=False)
    (logits, answers), (own_logits, own_answers) = outputs
    assert torch.equal(logits, own_logits)
    assert torch.equal(answers, own_answers)


def forward(config, attention):
    model = make_model(config, attention)
    positions = torch.tensor([[*range(6), *range(6, 10), *range(6, 11)]])
    mask, segments = torch.zeros(1, 1, 1, 1), Segments.from_tree(TREE)
    ids = torch.arange(15)[None]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, segments=segments, use_cache=False).logits


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3", "varlen"])
@pytest.mark.parametrize("config", [LLAMA, SOFT_CAPPED], ids=["plain", "soft-capped, windowed"])
def test_a_model_with_a_kernel_equals_the_segment_loop(install, kernel, config):
    if kernel == "varlen" and config is SOFT_CAPPED:
        pytest.skip("torch's varlen attention has no soft-capping; choose_attention refuses it")
    install(kernel)
    own = "sdpa" if config is LLAMA else "eager"
    expected = forward(config, registered_name("segments", own))
    torch.testing.assert_close(forward(config, registered_name(kernel, own)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "text"), [("s_aux", "attention sinks"), ("position_bias", "a position bias")])
def test_options_unsupported_by_packed_rows_are_refused_by_name(name, text):
    function = AttentionInterface()["sft_segments"]
    heads = torch.zeros(1, 2, 15, 4)
    with pytest.raises(NotImplementedError, match=f"packed rows have no {text}"):
        function(
            torch.nn.Module(), heads, heads, heads, None, segments=Segments.from_tree(TREE), **{name: torch.ones(2)}
        )


@pytest.mark.parametrize(
    ("kernel", "name", "text"),
    [("varlen", "softcap", "soft-capping"), ("varlen", "dropout", "dropout"), ("fa3", "dropout", "dropout")],
)
def test_options_a_kernel_lacks_are_refused_in_the_call(kernel, name, text):
    """Where a model's config has it under a name that choose_attention does not know."""
    heads = torch.zeros(1, 2, 15, 4)
    with pytest.raises(NotImplementedError, match=f"packed rows have no {text}"):
        AttentionInterface()[f"sft_{kernel}"](
            torch.nn.Module(), heads, heads, heads, None, segments=Segments.from_tree(TREE), **{name: 0.5}
        )


@pytest.mark.parametrize("shape", [(3, 5), (1, 5), (3, 1)])
def test_a_full_mask_is_recognized_without_reading_it(shape):
    full = torch.ones((1, 1), dtype=torch.bool, device="meta").expand(shape)  # a meta tensor has no values to read
    make_mask = AttentionMaskInterface()["sft_segments"]
    options = {"batch_size": shape[0], "q_length": shape[1], "kv_length": shape[1], "q_offset": 0, "kv_offset": 0}
    assert make_mask(**options, attention_mask=full, device=torch.device("cpu")) is None


def test_a_mask_that_hides_something_is_kept():
    mask = torch.ones((2, 5), dtype=torch.bool)
    mask[0, :2] = False
    options = {"batch_size": 2, "q_length": 5, "kv_length": 5, "q_offset": 0, "kv_offset": 0}
    make_mask = AttentionMaskInterface()["sft_segments"]
    made = make_mask(**options, attention_mask=mask, device=torch.device("cpu"))
    assert torch.equal(made[:, 0, -1], mask)


@pytest.mark.parametrize("with_segments", [True, False], ids=["segments", "no segments"])
def test_attention_runs_without_cudnn(monkeypatch, with_segments):
    seen = []

    def attend(*args, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return torch.zeros(1, 2, 15, 4), None

    def attend_to_segments(*args, **kwargs):
        return attend()[0]

    monkeypatch.setattr(interface.segment_attention, "attend", attend_to_segments)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", attend)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    heads = torch.zeros(1, 2, 15, 4)
    segments = Segments.from_tree(TREE) if with_segments else None
    AttentionInterface()["sft_segments"](torch.nn.Module(), heads, heads, heads, None, segments=segments)
    assert before
    assert seen == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled()
