"""Compare the loss inside the model's forward with a float32 cross-entropy of all logits."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from sft_lightning.data.batch import Example
from sft_lightning.data.batching.collate import collate
from sft_lightning.losses.functional import compute_entropy
from sft_lightning.losses.model_hooks import (
    asks_for_router_loss,
    install_label_loss,
    label_losses,
    makes_logits_in_chunks,
    use_the_models_own_logits,
)

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
ARCHITECTURES = {
    "qwen2-tied": Qwen2Config(**SHAPE, num_key_value_heads=1, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=False),
    "gpt2": GPT2Config(
        **{"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5},
        **{"bos_token_id": None, "eos_token_id": None, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
    "gemma2-soft-capped": Gemma2Config(**SHAPE, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0),
    "gpt-neox": GPTNeoXConfig(**SHAPE, attention_dropout=0.0, hidden_dropout=0.0),
    "cohere-scaled": CohereConfig(**SHAPE, num_key_value_heads=2, logit_scale=0.0625),
    "granite-scaled": GraniteConfig(**SHAPE, num_key_value_heads=2, logits_scaling=7.0),
}
POSITIONS = [1, 2, 3, 5, 6, 12, 13, 14]


def make_model(name="llama"):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES[name]), dtype=torch.float32)


def make_batch():
    """Rows of 5, 3 and 6 tokens: 4, 2 and 5 inputs padded to 5, so positions 1 2 3, 5 6, and 12 13 14 predict."""
    rows = [((11, 12, 13, 14, 15), 2), ((21, 22, 23), 1), ((31, 32, 33, 34, 35, 36), 3)]
    examples = [Example.from_prompt(np.array(tokens, dtype=np.int32), num_prompt) for tokens, num_prompt in rows]
    batch = collate(examples, np.array([0.5, 0.25, 0.125]), layout="padded", pad_token_id=0)
    assert batch.label_positions.tolist() == POSITIONS
    return batch


def plain_logits(model, batch):
    """The logits that predict the labels, by the model's own forward. Shape [M, V]."""
    mask = torch.arange(batch.input_ids.shape[1]) < torch.tensor(batch.sequence_lengths)[:, None]
    return model(input_ids=batch.input_ids, attention_mask=mask.long()).logits.flatten(0, 1)[POSITIONS]


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_the_plain_forward(name, chunked):
    plain, ours, batch = make_model(name), make_model(name), make_batch()
    logits = plain_logits(plain, batch)
    nll = F.cross_entropy(logits, batch.labels, reduction="none")
    (batch.loss_weights.float() * nll).sum().backward()

    install_label_loss(ours)
    assert makes_logits_in_chunks(ours)
    if not chunked:
        use_the_models_own_logits(ours)
    losses = label_losses(ours, batch, with_entropy=True)
    losses.weighted_sum.backward()
    torch.testing.assert_close(losses.nll, nll.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.weighted_sum, (batch.loss_weights * nll).sum().float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.entropy, compute_entropy(logits).detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(losses.correct, logits.argmax(-1) == batch.labels)
    for (parameter, expected), actual in zip(plain.named_parameters(), ours.parameters(), strict=True):
        # Both are float32, a few hundred terms deep.
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=parameter)


def test_the_scaled_and_capped_models_do_scale_and_cap():
    """Otherwise the test above would not notice that scale or cap was forgotten."""
    for name in ("gemma2-soft-capped", "cohere-scaled", "granite-scaled"):
        model, batch = make_model(name).eval(), make_batch()
        heads = []
        model.get_output_embeddings().register_forward_hook(lambda module, args, out, heads=heads: heads.append(out))
        logits = plain_logits(model, batch)
        assert (logits - heads[0].flatten(0, 1)[POSITIONS]).abs().max() > 1.0, name


def make_mixture(**options):
    """A mixture of experts in float64."""
    torch.manual_seed(1)
    config = MixtralConfig(
        **SHAPE, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, sliding_window=None, **options
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager")


def test_the_loss_of_routers_is_what_the_models_own_loss_has_besides():
    model = make_mixture(output_router_logits=True, router_aux_loss_coef=0.5)
    tokens = np.array([11, 12, 13, 14, 15], dtype=np.int32)
    own = model(input_ids=torch.tensor([tokens.tolist()]), labels=torch.tensor([[-100, -100, 13, 14, 15]]))
    install_label_loss(model)
    batch = collate([Example.from_prompt(tokens, 2)], [1 / 3], layout="padded", pad_token_id=0)
    losses = label_losses(model, batch)
    assert asks_for_router_loss(model)
    assert own.aux_loss > 1.9  # of two experts for each token: 2 if balanced
    # transformers computes both of its losses in float32.
    assert own.loss.item() == pytest.approx(losses.weighted_sum.item() + 0.5 * own.aux_loss.item(), rel=1e-6)


def test_asking_for_the_loss_of_routers_changes_no_gradient():
    asked, silent = make_mixture(output_router_logits=True), make_mixture()
    rows = [Example.from_prompt(np.arange(3, 3 + size, dtype=np.int32), 2) for size in (5, 9)]
    for model in (asked, silent):
        install_label_loss(model)
        label_losses(model, collate(rows, [0.5, 0.25], layout="padded", pad_token_id=0)).weighted_sum.backward()
    assert not asks_for_router_loss(silent)
    for ours, theirs in zip(asked.parameters(), silent.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_the_loss_of_routers_is_no_sum_over_micro_batches():
    """Two tokens, two experts, each token sure of another one: alone unbalanced, 2, together balanced, 1."""
    one, other = torch.tensor([[40.0, -40.0]]), torch.tensor([[-40.0, 40.0]])
    both = torch.cat([one, other])
    assert [float(load_balancing_loss_func((logits,), 2, 1)) for logits in (one, other, both)] == [2.0, 2.0, 1.0]


@pytest.mark.parametrize(("chunked", "num_positions"), [(True, 0), (False, 8)])
def test_the_head_runs_at_label_positions_or_nowhere(chunked, num_positions):
    model, batch = make_model(), make_batch()
    install_label_loss(model)
    if not chunked:
        use_the_models_own_logits(model)
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append((args[0].shape, output.shape)))
    label_losses(model, batch)
    assert shapes == [((1, num_positions, 16), (1, num_positions, 61))]


class HeadPastTheModule(nn.Module):
    """A model that uses its head's weight without calling the head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(61, 8)
        self.head = nn.Linear(8, 61)
        self.config = LlamaConfig(vocab_size=61)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=F.linear(self.embedding(input_ids), self.head.weight, self.head.bias))


def test_a_head_that_is_not_called_as_a_module_works():
    torch.manual_seed(0)
    model, batch = HeadPastTheModule(), make_batch()
    install_label_loss(model)
    logits = model.head(model.embedding(batch.input_ids.flatten()[POSITIONS]))
    losses = label_losses(model, batch)
    torch.testing.assert_close(losses.nll, F.cross_entropy(logits, batch.labels, reduction="none").detach())


@pytest.mark.parametrize("head", [nn.Sequential(nn.Linear(16, 61)), type("Adapted", (nn.Linear,), {})(16, 61)])
def test_a_head_that_is_not_linear_computes_its_own_logits(head):
    model, batch = make_model(), make_batch()
    model.lm_head = head
    install_label_loss(model)
    assert not makes_logits_in_chunks(model)
    expected = F.cross_entropy(plain_logits(model, batch), batch.labels, reduction="none")
    torch.testing.assert_close(label_losses(model, batch).nll, expected.detach(), rtol=1e-5, atol=1e-5)


class Adapted(nn.Module):
    """A head with a low-rank adapter around it, as PEFT puts one there."""

    def __init__(self, head):
        super().__init__()
        self.base_layer = head
        self.low, self.high = nn.Linear(16, 2, bias=False), nn.Linear(2, 61, bias=False)

    def forward(self, hidden):
        return self.base_layer(hidden) + self.high(self.low(hidden))


def test_an_adapter_may_wrap_the_head_later():
    model, batch = make_model(), make_batch()
    install_label_loss(model)
    model.lm_head = Adapted(model.lm_head)
    expected = F.cross_entropy(plain_logits(model, batch), batch.labels, reduction="none")
    losses = label_losses(model, batch)
    torch.testing.assert_close(losses.nll, expected.detach(), rtol=1e-5, atol=1e-5)
    losses.weighted_sum.backward()
    assert model.lm_head.high.weight.grad.norm() > 0


def test_plain_calls_and_generate_are_untouched():
    model, batch = make_model().eval(), make_batch()
    plain = model(input_ids=batch.input_ids).logits
    answers = model.generate(batch.input_ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    install_label_loss(model)
    label_losses(model, batch)
    assert torch.equal(model(input_ids=batch.input_ids).logits, plain)
    assert torch.equal(model.generate(batch.input_ids, max_new_tokens=6, do_sample=False, pad_token_id=0), answers)
    assert answers.shape == (3, 11)


def test_a_failed_forward_leaves_nothing_behind():
    model, batch = make_model().eval(), make_batch()
    plain = model(input_ids=batch.input_ids).logits
    install_label_loss(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[999]]), score_labels_of=batch)
    assert model.lm_head(torch.zeros(2, 3, 16)).shape == (2, 3, 61)
    assert torch.equal(model(input_ids=batch.input_ids).logits, plain)


def test_no_gradient_is_computed_without_grad_mode():
    model, batch = make_model(), make_batch()
    install_label_loss(model)
    with torch.no_grad():
        losses = label_losses(model, batch)
    assert not losses.weighted_sum.requires_grad
    assert losses.entropy is None


def test_installing_changes_no_name_weight_or_config():
    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    config = model.config.to_json_string()
    install_label_loss(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.config.to_json_string() == config
