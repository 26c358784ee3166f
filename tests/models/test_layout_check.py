"""Test the layout check on planted faults: its verdicts, its fallbacks, and that it leaves the model unchanged."""

import logging
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    Lfm2Config,
    Mamba2Config,
    MambaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2ForCausalLM,
)

from sft_lightning.data.batch import Example, Segments
from sft_lightning.data.batching.collate import collate
from sft_lightning.errors import UserError
from sft_lightning.losses.model_hooks import install_label_loss, label_losses, makes_logits_in_chunks
from sft_lightning.models.attention import segments as segment_attention
from sft_lightning.models.attention.selection import choose_attention
from sft_lightning.models.layout_check import choose_layout
from sft_lightning.models.loading import load_model
from sft_lightning.models.precision import Precision

ATTEND = segment_attention.attend
LAYOUTS = ("padded", "packed", "shared_prefix")


def guard(model, choice="auto", precision=nullcontext, **options):
    return choose_layout(model, choice, precision=precision, **options)


def refusal_of(model, choice):
    with pytest.raises(UserError) as raised:
        guard(model, choice)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def attend_to_the_whole_row(query, key, value, segments, *, scale, **options):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def attend_without_ancestors(query, key, value, segments, **options):
    alone = [segment._replace(parent=-1) for segment in segments.tree]
    return ATTEND(query, key, value, Segments.from_tree(alone), **options)


def attend_with_a_quarter_of_the_gradient(query, key, value, segments, **options):
    output = ATTEND(query, key, value, segments, **options)
    return 0.25 * output + 0.75 * output.detach()


def attend_without_a_backward_pass_over_ancestors(query, key, value, segments, **options):
    def fail(gradient):
        raise RuntimeError("no such backward pass")

    output = ATTEND(query, key, value, segments, **options)
    if output.requires_grad and segments.key_positions is not None:
        output.register_hook(fail)
    return output


@pytest.fixture
def model(model_folder):
    """A tiny Qwen2 whose attention is far from even."""
    model = load_model(model_folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def draw_a_random_number(module, args):
    torch.rand(1)


def random_model(config, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return load_model(str(folder))


def test_a_model_of_every_layout_gets_the_best_or_requested(model):
    assert guard(model) == "shared_prefix"
    assert [guard(model, layout) for layout in LAYOUTS] == list(LAYOUTS)


@pytest.mark.parametrize(
    ("fault", "layout", "problem"),
    [
        (attend_to_the_whole_row, "padded", "its losses differ from those of padded rows"),
        (attend_without_ancestors, "packed", "its losses differ from those of padded rows"),
        (attend_with_a_quarter_of_the_gradient, "padded", "its gradient norm differs from that of padded rows"),
        (attend_without_a_backward_pass_over_ancestors, "packed", "cannot compute it (RuntimeError: no such backward"),
    ],
)
def test_wrong_attention_falls_back_or_is_refused(fault, layout, problem, model, monkeypatch, caplog):
    monkeypatch.setattr(segment_attention, "attend", fault)
    with caplog.at_level(logging.INFO, "sft_lightning"):
        assert guard(model) == layout
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [warning.split(",")[0] for warning in warnings] == [
        f"layout: not {refused}" for refused in ("shared_prefix", "packed")[: len(warnings)]
    ]
    assert len(warnings) == (2 if layout == "padded" else 1)
    assert all(problem in warning for warning in warnings)
    assert caplog.records[-1].getMessage() == f"layout: {layout}"

    message = refusal_of(model, "shared_prefix")
    assert message.startswith("data.layout 'shared_prefix' does not suit this model: ")
    assert problem in message
    assert message.endswith("; use auto or padded")
    assert guard(model, "padded") == "padded"


def test_gradients_are_compared_when_validation_asks_first(fit, val_file, monkeypatch, caplog):
    """The sanity check before training runs without gradients."""
    monkeypatch.setattr(segment_attention, "attend", attend_with_a_quarter_of_the_gradient)
    with caplog.at_level(logging.WARNING, "sft_lightning"):
        fit(data={"val_path": val_file}, max_steps=1)
    assert caplog.text.count("its gradient norm differs from that of padded rows") == 2


@pytest.mark.parametrize(("choice", "layout"), [("auto", "padded"), ("shared_prefix", "shared_prefix")])
def test_a_model_of_few_positions_is_not_tried(choice, layout, tmp_path, caplog):
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    assert guard(random_model(config, tmp_path), choice) == layout
    assert "the model is limited to 32 tokens" in caplog.text


def test_out_of_memory_is_not_a_layout_fault(model, monkeypatch):
    def run_out(*args, **options):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(segment_attention, "attend", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        guard(model)


def test_without_gradients_only_losses_are_compared(model, monkeypatch):
    monkeypatch.setattr(segment_attention, "attend", attend_with_a_quarter_of_the_gradient)
    with torch.no_grad():
        assert guard(model, with_gradients=False) == "shared_prefix"


STATE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
HEADS = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}
# Their steps are so long that a state is forgotten within a few tokens.
FORGETFUL = {"time_step_min": 0.5, "time_step_max": 2.0, "time_step_floor": 0.5}
SHORT_CONVOLUTIONS = Lfm2Config(
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "conv"]},
)


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(**STATE),
        Mamba2Config(**STATE, **HEADS),
        Mamba2Config(**STATE, **HEADS, **FORGETFUL),
        SHORT_CONVOLUTIONS,
    ],
    ids=["mamba", "mamba2", "mamba2-forgetful", "short-convolutions"],
)
def test_a_model_with_recurrent_state_is_padded(config, tmp_path):
    model = random_model(config, tmp_path)
    assert guard(model) == "padded"
    for layout in ("packed", "shared_prefix"):
        assert refusal_of(model, layout).startswith(f"data.layout '{layout}' does not suit this model: ")


def test_chunked_attention_falls_back_even_for_rows_within_a_chunk(model):
    model.config.attention_chunk_size = 8192
    assert guard(model) == "padded"
    assert "attends in chunks of the row" in refusal_of(model, "packed")


class WithScaledLogits(Qwen2ForCausalLM):
    """Changes its logits in a way that its config does not declare."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 1.5 * output.logits
        return output


class WithRowsThatSeeEachOther(Qwen2ForCausalLM):
    def forward(self, input_ids, **kwargs):
        embeddings = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=embeddings + embeddings.flip(0), **kwargs)


def load_as(model_class, folder, dtype=torch.float32):
    config = model_class.config_class.from_pretrained(folder)
    attention = choose_attention(config, "auto", device_type="cpu", half_precision=False)
    model = model_class.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    install_label_loss(model)
    return model.train()


def test_a_config_that_asks_for_the_loss_of_routers_keeps_every_layout(tmp_path, caplog):
    """transformers computes that loss from the mask, which packed rows do not have."""
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": None}
    config = MixtralConfig(**sizes, **heads, max_position_embeddings=512, output_router_logits=True)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    assert choose_layout(load_as(MixtralForCausalLM, tmp_path), "auto", precision=nullcontext) == "shared_prefix"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def rows():
    tokens = np.random.default_rng(3).integers(3, 200, 100).astype(np.int32)
    common = tokens[:20]
    lengths = ((4, 7), (4, 3), (9, 1))
    return [
        Example.from_prompt(np.concatenate([common, tokens[20 + 20 * row :][: own + labels]]), 20 + own, f"row {row}")
        for row, (own, labels) in enumerate(lengths)
    ]


def test_logits_scaled_after_the_head_give_the_scaled_gradient(model_folder, caplog):
    weight = 1 / 11
    own = Qwen2ForCausalLM.from_pretrained(model_folder, dtype=torch.float64, attn_implementation="eager")
    for example in rows():
        (sequence,) = example.sequences
        ((start, _, _),) = sequence.label_spans
        ids = torch.from_numpy(sequence.tokens.astype(np.int64))
        logits = 1.5 * own(ids[None, :-1]).logits[0, start - 1 :]
        (weight * F.cross_entropy(logits, ids[start:], reduction="sum")).backward()
    expected = {name: parameter.grad for name, parameter in own.named_parameters()}

    model = load_as(WithScaledLogits, model_folder)
    assert makes_logits_in_chunks(model)
    with caplog.at_level(logging.INFO, "sft_lightning"):
        assert guard(model) == "shared_prefix"
    assert not makes_logits_in_chunks(model)
    assert any("the model's own logits" in record.getMessage() for record in caplog.records)
    for layout in LAYOUTS:
        model.zero_grad()
        batch = collate(rows(), [weight] * 3, layout=layout, pad_token_id=1)
        label_losses(model, batch).weighted_sum.backward()
        total = torch.nn.utils.get_total_norm(expected.values())
        for name, parameter in model.named_parameters():
            # float32 against float64
            if expected[name].norm() >= 1e-6 * total:
                assert (parameter.grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), (layout, name)


def test_a_model_with_interacting_padded_rows_is_refused(model_folder):
    message = refusal_of(load_as(WithRowsThatSeeEachOther, model_folder), "auto")
    assert message.startswith(
        "model.model_path: in a padded batch the model gives different losses than on each row alone"
    )


@pytest.mark.parametrize("fault", [None, attend_to_the_whole_row, attend_without_a_backward_pass_over_ancestors])
@pytest.mark.parametrize("choice", ["auto", "shared_prefix"])
def test_the_check_restores_weights_gradients_modes_and_random_state(fault, choice, model, monkeypatch):
    if fault is not None:
        monkeypatch.setattr(segment_attention, "attend", fault)
    model.model.layers[0].eval()
    model.model.layers[1].register_forward_pre_hook(draw_a_random_number)
    parameters = dict(model.named_parameters())
    parameters["model.norm.weight"].grad = torch.full_like(parameters["model.norm.weight"], 3.0)
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    ids = torch.arange(12)[None]
    logits = model(ids).logits
    random_state = torch.get_rng_state()

    if fault is not None and choice != "auto":
        refusal_of(model, choice)
    else:
        guard(model, choice)

    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is gradients[name] for name, parameter in parameters.items())
    assert parameters["model.norm.weight"].grad.unique().tolist() == [3.0]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model(ids).logits, logits)


def test_dropout_is_off_meanwhile(dropout_model_folder):
    assert guard(load_model(dropout_model_folder)) == "shared_prefix"


@pytest.mark.parametrize(("name", "entered"), [("32-true", 0), ("bf16-true", 1)])
def test_float32_replaces_the_precision_of_training_where_it_shows_more(name, entered, model_folder):
    times = 0

    @contextmanager
    def precision():
        nonlocal times
        times += 1
        yield

    assert guard(load_model(model_folder, precision=Precision.named(name)), precision=precision) == "shared_prefix"
    assert times == entered


def test_autocast_around_the_check_does_not_hide_faults(model):
    with torch.autocast("cpu", torch.bfloat16):
        assert guard(model) == "shared_prefix"


@pytest.mark.parametrize(("choice", "layout"), [("auto", "padded"), ("packed", "packed")])
def test_nonfinite_losses_decide_nothing(choice, layout, model, caplog):
    model.model.norm.weight.data[0] = float("nan")
    assert guard(model, choice) == layout
    assert "the model's losses are not finite" in caplog.text
