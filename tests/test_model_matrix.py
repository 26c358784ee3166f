"""Test tiny random models of many families: the layouts each supports, and its gradients against its own equation.

The reference is the family's own code, called on one row at a time, in float64 throughout: no padding, no packing, and
no attention, loss or layout of this package. docs/models.md is the table of what is found here. To write it afresh:

    SFT_WRITE_DOCS=1 python -m pytest tests/test_model_matrix.py
"""

import json
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

from sft_lightning.data.batch import Example
from sft_lightning.data.batching.collate import collate
from sft_lightning.errors import UserError
from sft_lightning.losses.model_hooks import label_losses, makes_logits_in_chunks
from sft_lightning.models.attention.selection import choose_attention
from sft_lightning.models.layout_check import choose_layout
from sft_lightning.models.loading import load_model, save_model
from sft_lightning.models.precision import Precision

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
LAYOUTS = ("padded", "packed", "shared_prefix")
# Tolerance of gradients. A loss is a sum of a hundred float32 terms, which round by 6e-8 each.
LARGEST_GRADIENT_DIFFERENCE = 1e-5
LARGEST_LOSS_DIFFERENCE = 1e-6
# In float64: nothing but rounding, in matrix products of a few dozen terms.
LARGEST_DIFFERENCE_FLOAT64 = 1e-12

VOCABULARY_SIZE = 96
WINDOW = 8  # shorter than all rows but one
TOKENS = {"vocab_size": VOCABULARY_SIZE, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
SMALL = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
MLP = {**SMALL, "intermediate_size": 48}
GROUPED = {**MLP, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 24}
STATE_SPACE = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}


@dataclass(frozen=True)
class Family:
    """A model family and its expected results.

    Attributes:
        config: Name of its config class in transformers.
        special: What makes it worth a row of the table.
        options: Of the config.
        refusal: What the reason for padded rows only must say; None where every layout works.
        chunked: Whether the loss is made in chunks.
    """

    config: str
    special: str
    options: dict[str, Any] = field(default_factory=dict)
    refusal: str | None = None
    chunked: bool = True

    @property
    def layouts(self) -> tuple[str, ...]:
        return ("padded",) if self.refusal else LAYOUTS


_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_GEMMA2 = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}
_GRANITE = {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "attention_multiplier": 0.25}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
_GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LINEAR_HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
_LINEAR = {**_LINEAR_HEADS, "linear_key_head_dim": 8, "linear_value_head_dim": 8}

FAMILIES = {
    "Qwen2": Family("Qwen2Config", "tied head", {**GROUPED, "tie_word_embeddings": True}),
    "Qwen3": Family("Qwen3Config", "normalized queries and keys", {**GROUPED, "head_dim": 16}),
    "Llama": Family("LlamaConfig", "untied head", GROUPED),
    "Mistral": Family("MistralConfig", "sliding window", {**GROUPED, "sliding_window": WINDOW}),
    "Gemma 2": Family(
        "Gemma2Config",
        "scores and logits soft-capped, local layers",
        {**GROUPED, **_TWO_KINDS, **_GEMMA2, "head_dim": 8},
    ),
    "Gemma 3": Family(
        "Gemma3TextConfig", "local layers with rotary angles of their own", {**GROUPED, **_TWO_KINDS, "head_dim": 8}
    ),
    "Phi-3": Family("Phi3Config", "fused projections", {**GROUPED, "sliding_window": None}),
    "Phi-3, windowed": Family("Phi3Config", "sliding window", {**GROUPED, "sliding_window": WINDOW}),
    "OLMo 2": Family("Olmo2Config", "norms behind the layers", GROUPED),
    "StarCoder 2": Family(
        "Starcoder2Config",
        "sliding window, biases",
        {**GROUPED, "sliding_window": WINDOW, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    ),
    "GPT-2": Family("GPT2Config", "learned positions, tied head", {**TOKENS, **_GPT2_SIZES, **_NO_DROPOUT}),
    "GPT-NeoX": Family("GPTNeoXConfig", "parallel layers, partly rotary", MLP),
    "OPT": Family(
        "OPTConfig",
        "learned positions with an offset",
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "pad_token_id": 1},
    ),
    "Cohere": Family("CohereConfig", "logits multiplied", {**GROUPED, "logit_scale": 0.25}),
    "Granite": Family(
        "GraniteConfig", "logits divided, residuals scaled", {**GROUPED, **_GRANITE, "logits_scaling": 3.0}
    ),
    "HyperCLOVA X": Family(
        "HyperCLOVAXConfig",
        "logits multiplied by what divides them elsewhere",
        {**GROUPED, **_GRANITE, "logits_scaling": 3.0},
        chunked=False,
    ),
    "Mixtral": Family("MixtralConfig", "experts", {**GROUPED, "num_local_experts": 4, "sliding_window": None}),
    "Qwen2-MoE": Family("Qwen2MoeConfig", "experts, one of them shared", SHARED_EXPERT),
    "Qwen3-MoE": Family("Qwen3MoeConfig", "experts", {**EXPERTS, "head_dim": 8}),
    "DeepSeek-V3": Family(
        "DeepseekV3Config",
        "latent attention (values narrower than keys), experts",
        {
            **GROUPED,
            **_LATENT,
            **_GROUPS,
            "num_key_value_heads": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "Qwen2-MoE, windowed": Family(
        "Qwen2MoeConfig",
        "sliding window in the mask only",
        {**SHARED_EXPERT, **_TWO_KINDS, "use_sliding_window": True},
        refusal="sliding window",
    ),
    "GPT-OSS": Family(
        "GptOssConfig",
        "attention sinks, experts",
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
        refusal="attention sinks",
    ),
    "Llama 4": Family(
        "Llama4TextConfig",
        "attention in chunks of the row, experts",
        {**GROUPED, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": WINDOW},
        refusal="attends in chunks",
    ),
    "BLOOM": Family(
        "BloomConfig", "ALiBi", {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}, refusal="cannot compute"
    ),
    "Falcon": Family("FalconConfig", "its own attention", {**SMALL, "multi_query": True}, refusal="its losses differ"),
    "Mamba": Family("MambaConfig", "state space", STATE_SPACE, refusal="carries a state"),
    "Mamba 2": Family(
        "Mamba2Config",
        "state space",
        {**STATE_SPACE, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
        refusal="carries a state",
    ),
    "LFM2": Family(
        "Lfm2Config",
        "short convolutions and attention",
        {**GROUPED, "layer_types": ["conv", "full_attention"]},
        refusal="carries a state",
    ),
    "Qwen3-Next": Family(
        "Qwen3NextConfig",
        "linear attention and attention, experts",
        {**SHARED_EXPERT, **_LINEAR, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        refusal="carries a state",
    ),
}


def rows() -> list[Example]:
    """A preamble in all rows but one, prompts with one to three responses, responses of 1 to 14 tokens."""
    tokens = iter(np.random.default_rng(1).integers(3, VOCABULARY_SIZE, 400).tolist())

    def take(count: int) -> list[int]:
        return [next(tokens) for _ in range(count)]

    preamble = take(18)
    prompts = [preamble + take(count) for count in (17, 20, 4, 9)] + [take(1)]
    responses = [(0, 9), (1, 6), (2, 12), (0, 1), (3, 3), (0, 4), (4, 14), (1, 2)]
    return [
        Example.from_prompt(
            np.array(prompts[prompt] + take(count), dtype=np.int32), len(prompts[prompt]), f"row {number}"
        )
        for number, (prompt, count) in enumerate(responses)
    ]


ROWS = rows()
LABEL_WEIGHTS = np.linspace(0.5, 1.5, len(ROWS)) / sum(example.num_labels for example in ROWS)


class InFloat64(TorchFunctionMode):
    """Makes float64 of the float32 that model code asks for by name, in norms, softmax and rotary angles."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def widen(value):
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        widened = {name: widen(value) for name, value in (kwargs or {}).items()}
        return function(*map(widen, args), **widened)


def with_plain_experts(model):
    """torch's grouped matrix product, which transformers takes for experts, has no float64."""
    if "experts" in str(model):
        model.set_experts_implementation("eager")
    return model


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(parameter, dtype=torch.float64) if parameter.grad is None else parameter.grad.double()
        for name, parameter in model.named_parameters()
    }


@cache
def reference(folder: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Returns loss and gradients of the sum over rows, in float64, by the family's own code alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    model = with_plain_experts(model).train()
    for parameter in model.parameters():  # routers may be kept in float32
        parameter.data = parameter.data.double()
    loss = torch.zeros((), dtype=torch.float64)
    with InFloat64():
        for example, weight in zip(ROWS, LABEL_WEIGHTS, strict=True):
            (sequence,) = example.sequences
            ((start, _, _),) = sequence.label_spans
            ids = torch.from_numpy(sequence.tokens.astype(np.int64))
            logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0, start - 1 :]
            assert logits.dtype == torch.float64
            loss = loss + weight * F.cross_entropy(logits, ids[start:], reduction="sum")
        loss.backward()
    return loss.item(), gradients_of(model)


def loss_and_gradients(model, layout: str) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = label_losses(model, collate(ROWS, LABEL_WEIGHTS, layout=layout, pad_token_id=0)).weighted_sum
    loss.backward()
    return loss.item(), gradients_of(model)


def differences(
    got: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]
) -> tuple[float, float]:
    """Returns the relative difference of the losses, and the largest one of a gradient tensor and of all in one."""
    (loss, gradients), (expected_loss, expected_gradients) = got, expected
    assert gradients.keys() == expected_gradients.keys()
    errors = {name: gradients[name] - gradient for name, gradient in expected_gradients.items()}
    total = torch.nn.utils.get_total_norm(expected_gradients.values())
    largest = [torch.nn.utils.get_total_norm(errors.values()) / total]
    for name, gradient in expected_gradients.items():
        if gradient.norm() >= 1e-6 * total:
            largest.append(errors[name].norm() / gradient.norm())
    return abs(loss / expected_loss - 1), float(torch.stack(largest).max())


@dataclass(frozen=True)
class Result:
    """What became of a family. ``differences``: layout and dtype to (of the loss, of the gradients)."""

    layouts: tuple[str, ...]
    preferred: str
    chunked: bool
    refusals: tuple[str, ...]
    differences: dict[tuple[str, torch.dtype], tuple[float, float]]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory) -> Callable[[str], str]:
    @cache
    def make(name: str) -> str:
        family = FAMILIES[name]
        torch.manual_seed(0)
        config = getattr(transformers, family.config)(**family.options)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # so that attention is uneven, and no bias or norm without effect
                parameter += 0.15 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="module")
def result_of(folder_of) -> Callable[[str], Result]:
    @cache
    def measure(name: str) -> Result:
        folder = folder_of(name)
        expected = reference(folder)
        model = load_model(folder)
        preferred = choose_layout(model, "auto", precision=nullcontext)
        layouts, refusals = [], []
        for layout in LAYOUTS:
            try:
                layouts.append(choose_layout(model, layout, precision=nullcontext))
            except UserError as error:
                refusals.append(str(error))
        found = {}
        for layout in layouts:
            found[layout, torch.float32] = differences(loss_and_gradients(model, layout), expected)
        exact_model = with_plain_experts(load_model(folder, precision=Precision.named("64-true")))
        choose_layout(exact_model, "padded", precision=nullcontext)  # decides how logits are made
        with InFloat64():
            for layout in layouts:
                found[layout, torch.float64] = differences(loss_and_gradients(exact_model, layout), expected)
        return Result(tuple(layouts), preferred, makes_logits_in_chunks(model), tuple(refusals), found)

    return measure


@pytest.mark.parametrize("name", FAMILIES)
def test_supported_layouts_give_the_gradients_of_single_rows(name, result_of):
    result = result_of(name)
    assert result.layouts == FAMILIES[name].layouts
    assert result.preferred == result.layouts[-1]
    for (layout, dtype), (loss_difference, gradient_difference) in result.differences.items():
        in_float32 = dtype == torch.float32
        assert loss_difference <= (LARGEST_LOSS_DIFFERENCE if in_float32 else LARGEST_DIFFERENCE_FLOAT64), layout
        assert gradient_difference <= (LARGEST_GRADIENT_DIFFERENCE if in_float32 else LARGEST_DIFFERENCE_FLOAT64), (
            layout
        )
    assert len(result.differences) == 2 * len(result.layouts)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.refusal])
def test_unsupported_layouts_are_refused_in_one_line(name, result_of):
    refusals = result_of(name).refusals
    assert len(refusals) == 2
    for layout, refusal in zip(("packed", "shared_prefix"), refusals, strict=True):
        assert refusal.startswith(f"data.layout '{layout}' does not suit this model: ")
        assert FAMILIES[name].refusal in refusal
        assert refusal.endswith("; use auto or padded")
        assert "\n" not in refusal


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_chunks_its_loss_as_expected(name, result_of):
    assert result_of(name).chunked == FAMILIES[name].chunked


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["Qwen2", "Gemma 2", "GPT-2"])
def test_gradient_checkpointing_changes_no_gradient(name, layout, folder_of):
    model = load_model(folder_of(name), gradient_checkpointing=True)
    num_calls = 0

    def count(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1

    layer = next(module for path, module in model.named_modules() if path.endswith("0.mlp"))
    layer.register_forward_pre_hook(count)
    loss_difference, gradient_difference = differences(loss_and_gradients(model, layout), reference(folder_of(name)))
    assert num_calls == 2  # once forward, once more in the backward pass
    assert loss_difference <= LARGEST_LOSS_DIFFERENCE
    assert gradient_difference <= LARGEST_GRADIENT_DIFFERENCE


@pytest.mark.parametrize("name", FAMILIES)
def test_without_segments_a_model_equals_that_of_transformers(name, folder_of, tmp_path):
    """Logits and greedy answers are bit-equal, and a saved folder does not mention this package."""
    model = load_model(folder_of(name)).eval()
    own_attention = "eager" if model.config._attn_implementation.endswith("eager") else "sdpa"
    own = AutoModelForCausalLM.from_pretrained(
        folder_of(name), dtype=torch.float32, attn_implementation=own_attention
    ).eval()
    ids = torch.from_numpy(np.random.default_rng(2).integers(3, VOCABULARY_SIZE, (3, 20)))
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :2] = 0, 0
    generation = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    with torch.no_grad():
        assert torch.equal(model(ids).logits, own(ids).logits)
        assert torch.equal(model(ids, attention_mask=mask).logits, own(ids, attention_mask=mask).logits)
        answers = [m.generate(ids, attention_mask=mask, **generation) for m in (model, own)]
    assert torch.equal(*answers)
    assert answers[0].shape == (3, 28)

    save_model(model, None, tmp_path)
    config, own_config = (json.loads((Path(f) / "config.json").read_text()) for f in (tmp_path, folder_of(name)))
    assert config == own_config
    with (
        safe_open(tmp_path / "model.safetensors", "pt") as saved,
        safe_open(Path(folder_of(name)) / "model.safetensors", "pt") as original,
    ):
        assert set(saved.keys()) == set(original.keys())
        assert all(torch.equal(saved.get_tensor(key), original.get_tensor(key)) for key in original.keys())  # noqa: SIM118


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gets_an_attention_on_a_gpu(name, folder_of, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    config = AutoConfig.from_pretrained(folder_of(name))
    attention = choose_attention(config, "auto", device_type="cuda", half_precision=True)
    on_cpu = choose_attention(config, "auto", device_type="cpu", half_precision=True)
    if on_cpu.startswith("sft_"):
        assert attention.startswith("sft_")
    else:
        assert attention == on_cpu  # transformers' own, since the family takes no other
        for kernel in ("flash_attention_2", "varlen"):
            with pytest.raises(UserError, match="cannot run here: the model implements attention itself"):
                choose_attention(config, kernel, device_type="cuda", half_precision=True)


@pytest.mark.parametrize("config", [GPT2Config(attn_pdrop=0.1), LlamaConfig(attention_dropout=0.1)], ids=type)
def test_models_with_dropout_get_no_kernel_without_it(config, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    with pytest.raises(UserError, match="'varlen' cannot run here: it has no dropout"):
        choose_attention(config, "varlen", device_type="cuda", half_precision=True)


def render(results: dict[str, Result]) -> str:
    """Returns docs/models.md: bounds instead of measured digits, which differ from machine to machine."""
    lines = [
        "# Models",
        "",
        "Which layouts work with which model families, tested on tiny random models. `tests/test_model_matrix.py`",
        "writes this page when it runs with `SFT_WRITE_DOCS=1`.",
        "",
        "`layout: auto` takes the last layout of a row. Where that is `padded`, the last column has the reason, and",
        "the error for another layout names it, too. Families without a row are checked before training as all are,",
        "on a few tiny examples.",
        "",
        "The largest difference is the relative one of any gradient tensor in any of the layouts, against the",
        "family's own code in float64 on one row at a time. A loss in chunks never computes the logits of all label",
        "positions at once. It is computed on whole logits where a family transforms them in an unknown way.",
        "",
        "| family | what is special | layouts | loss | largest difference, float32 | float64 | why no other layout |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        reason = ""
        if result.refusals:
            reason = result.refusals[-1].split("this model: ")[1].removesuffix("; use auto or padded")
            reason = re.sub(r" by \S+ \(allowed \S+\)", "", reason)
        cells = [
            name,
            FAMILIES[name].special,
            ", ".join(result.layouts),
            "in chunks" if result.chunked else "whole",
            f"<= {LARGEST_GRADIENT_DIFFERENCE:.0e}",
            f"<= {LARGEST_DIFFERENCE_FLOAT64:.0e}",
            reason,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_matches_these_results(result_of):
    table = render({name: result_of(name) for name in FAMILIES})
    if os.environ.get("SFT_WRITE_DOCS"):
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(table, "utf-8")
    assert DOCUMENT.read_text("utf-8") == table, "docs/models.md is out of date: run this test with SFT_WRITE_DOCS=1"
