import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sft_lightning.errors import UserError
from sft_lightning.losses.functional import (
    compute_entropy,
    compute_sft_loss,
    get_response_log_probs,
    masked_normalize,
    sft_microbatch_train_step,
    token_nll,
)

# exp of these logits is 1, 2, 5: probabilities 1/8, 2/8, 5/8.
EIGHTHS = [0.0, math.log(2), math.log(5)]
LOG_2, LOG_8 = math.log(2), math.log(8)


class Bigrams(nn.Module):
    """A language model whose logits are a row of a table: every result can be calculated by hand."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table))

    def forward(self, input_ids, use_cache=True):
        assert use_cache is False, "a training forward that keeps keys and values wastes memory"
        return SimpleNamespace(logits=self.table[input_ids])


def reference_nll(logits, label):
    """-log softmax in plain Python floats, which are float64."""
    top = max(logits)
    return math.log(math.fsum(math.exp(x - top) for x in logits)) + top - logits[label]


# token_nll


def test_token_nll_of_known_probabilities():
    logits = torch.tensor([[EIGHTHS, EIGHTHS], [EIGHTHS, [0.0, 0.0, 0.0]]])
    nll = token_nll(logits, torch.tensor([[0, 1], [2, 1]]))
    assert nll.dtype == torch.float32
    expected = [[LOG_8, math.log(4)], [math.log(8 / 5), math.log(3)]]
    torch.testing.assert_close(nll, torch.tensor(expected))


def test_token_nll_takes_any_leading_shape_and_none_at_all():
    assert token_nll(torch.zeros(4), torch.tensor(1)).item() == pytest.approx(math.log(4))
    assert token_nll(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert token_nll(torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, dtype=torch.int64)).shape == (2, 3, 5)


def test_token_nll_matches_plain_python_in_float64():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 11, generator=generator, dtype=torch.float64) * 10
    labels = torch.randint(0, 11, (7,), generator=generator)
    nll = token_nll(logits, labels)
    assert nll.dtype == torch.float64
    expected = [reference_nll(row.tolist(), label) for row, label in zip(logits, labels.tolist(), strict=True)]
    assert nll.tolist() == pytest.approx(expected, rel=1e-13)


def test_token_nll_of_bfloat16_logits_is_computed_in_float32():
    logits = (torch.arange(50.0) / 7).to(torch.bfloat16)  # rounded here, once; nothing is rounded after it
    nll = token_nll(logits, torch.tensor(3))
    assert nll.dtype == torch.float32
    assert nll.item() == pytest.approx(reference_nll(logits.tolist(), 3), rel=1e-6)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_token_nll_is_finite_and_exact_at_extreme_logits(size):
    # Two equal logits share the probability at any size; the third is that much less likely.
    logits = torch.tensor([[size, size, -size]] * 2, requires_grad=True)
    nll = token_nll(logits, torch.tensor([1, 2]))
    assert nll.tolist() == pytest.approx([LOG_2, 2 * size + LOG_2])
    nll.sum().backward()
    assert logits.grad.tolist() == [[0.5, -0.5, 0.0], [0.5, 0.5, -1.0]]


def test_token_nll_gradient_is_probability_minus_one_hot():
    logits = torch.tensor([EIGHTHS], requires_grad=True)
    token_nll(logits, torch.tensor([1])).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1 / 8, 2 / 8 - 1, 5 / 8]]))


def test_token_nll_is_zero_without_a_label():
    logits = torch.tensor([EIGHTHS, EIGHTHS], requires_grad=True)
    nll = token_nll(logits, torch.tensor([-100, 0]))
    assert nll.tolist() == pytest.approx([0.0, LOG_8])
    nll.sum().backward()
    assert logits.grad[0].tolist() == [0.0, 0.0, 0.0]


def test_token_nll_refuses_a_label_outside_of_the_vocabulary():
    with pytest.raises(IndexError, match="3"):
        token_nll(torch.zeros(1, 3), torch.tensor([3]))


# masked_normalize

TENSOR = [[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]
MASK = [[1, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize(
    ("dim", "expected"), [(None, 21 / 10), (0, [0.1, 1.6, 0.4]), (1, [0.5, 1.6]), (-1, [0.5, 1.6])]
)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_masked_normalize_sums_and_divides_by_the_constant(dim, expected, mask_dtype):
    result = masked_normalize(torch.tensor(TENSOR), torch.tensor(MASK).to(mask_dtype), 10.0, dim=dim)
    torch.testing.assert_close(result, torch.tensor(expected))


def test_masked_normalize_of_an_empty_mask_is_zero():
    assert masked_normalize(torch.tensor(TENSOR), torch.zeros(2, 3), 7.0).item() == 0.0


def test_masked_normalize_ignores_masked_out_values():
    tensor = torch.tensor([1.0, math.nan, math.inf, 2.0], requires_grad=True)
    result = masked_normalize(tensor, torch.tensor([True, False, False, True]), 2.0)
    assert result.item() == 1.5
    result.backward()
    assert tensor.grad.tolist() == [0.5, 0.0, 0.0, 0.5]


# compute_entropy


def test_entropy_of_known_distributions():
    entropy = compute_entropy(torch.tensor([[EIGHTHS, [3.0, 3.0, 3.0]], [[0.0, 0.0, -math.inf], [0.0, 500.0, 0.0]]]))
    eighths = LOG_8 / 8 + math.log(4) / 4 + math.log(8 / 5) * 5 / 8
    torch.testing.assert_close(entropy, torch.tensor([[eighths, math.log(3)], [LOG_2, 0.0]]))


@pytest.mark.parametrize("offset", [-1e4, 1e4, 1e7])
def test_entropy_keeps_its_digits_when_all_logits_are_large(offset):
    assert compute_entropy(torch.tensor([offset, offset, offset - 1e6])).item() == pytest.approx(LOG_2, rel=1e-6)


def test_entropy_of_bfloat16_logits_is_computed_in_float32():
    logits = (torch.arange(50.0) / 20).to(torch.bfloat16)
    nlls = [reference_nll(logits.tolist(), label) for label in range(50)]
    entropy = compute_entropy(logits)
    assert entropy.dtype == torch.float32
    assert entropy.item() == pytest.approx(math.fsum(math.exp(-nll) * nll for nll in nlls), rel=1e-6)


def test_entropy_gradient_passes_gradcheck_and_stays_finite_at_minus_infinity():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(compute_entropy, logits)
    masked = torch.tensor([1.0, 2.0, -math.inf], requires_grad=True)
    compute_entropy(masked).backward()
    assert masked.grad.isfinite().all()


# get_response_log_probs

INPUT_IDS = torch.tensor([[0, 1, 2], [2, 0, 0]])
LABELS = torch.tensor([[1, 2, 0], [0, 1, 1]])
TABLE = [EIGHTHS, [0.0, 0.0, 0.0], [0.0, LOG_2, 0.0]]
LOG_PROBS = [[-math.log(4), -math.log(3), -math.log(4)], [-math.log(4), -math.log(4), -math.log(4)]]


def test_log_probs_are_unmasked_and_unshifted():
    outputs = get_response_log_probs(Bigrams(TABLE), INPUT_IDS, LABELS)
    assert list(outputs) == ["log_probs"]
    torch.testing.assert_close(outputs["log_probs"], torch.tensor(LOG_PROBS))


def test_log_probs_carry_gradient_and_entropy_does_not():
    model = Bigrams(TABLE)
    outputs = get_response_log_probs(model, INPUT_IDS, LABELS, return_token_entropy=True)
    entropy_of = [LOG_8 / 8 + math.log(4) / 4 + math.log(8 / 5) * 5 / 8, math.log(3), math.log(4) - LOG_2 / 2]
    expected = [[entropy_of[token] for token in row] for row in INPUT_IDS.tolist()]
    torch.testing.assert_close(outputs["token_entropy"], torch.tensor(expected))
    assert not outputs["token_entropy"].requires_grad
    outputs["log_probs"].sum().backward()
    # Token 1 occurs once and its label is 2: one-hot minus the three equal probabilities.
    torch.testing.assert_close(model.table.grad[1], torch.tensor([-1 / 3, -1 / 3, 2 / 3]))


def test_log_probs_of_a_bfloat16_model_are_float32():
    outputs = get_response_log_probs(Bigrams(TABLE).bfloat16(), INPUT_IDS, LABELS, return_token_entropy=True)
    assert {name: tensor.dtype for name, tensor in outputs.items()} == {
        "log_probs": torch.float32,
        "token_entropy": torch.float32,
    }


# sft_microbatch_train_step


def test_train_step_by_hand():
    log_probs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -100.0]], requires_grad=True)
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]])
    loss, metadata = sft_microbatch_train_step(log_probs, mask, gradient_accumulation_steps=4, normalize_constant=10.0)
    # Rows: 5/10 and 4/10; their mean 0.45; a quarter of it.
    assert loss.item() == pytest.approx(0.1125)
    assert loss.shape == ()
    assert not loss.requires_grad
    each = -1 / (4 * 2 * 10)
    torch.testing.assert_close(log_probs.grad, torch.tensor([[0.0, each, each], [each, 0.0, 0.0]]))
    assert metadata["nll_sum"].item() == 9.0
    assert metadata["num_response_tokens"].item() == 3


def test_train_steps_accumulate_to_the_gradient_of_all_rows():
    log_probs = -torch.rand(6, 5, generator=torch.Generator().manual_seed(2))
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(3)) < 0.6
    whole = log_probs.clone().requires_grad_()
    (-(whole * mask).sum() / 6).backward()
    parts = log_probs.clone().requires_grad_()
    for start in (0, 2, 4):
        rows = slice(start, start + 2)
        sft_microbatch_train_step(parts[rows], mask[rows], gradient_accumulation_steps=3)
    torch.testing.assert_close(parts.grad, whole.grad)


def test_train_step_without_response_tokens_has_loss_and_gradient_zero():
    log_probs = torch.full((2, 3), -1.0, requires_grad=True)
    loss, metadata = sft_microbatch_train_step(log_probs, torch.zeros(2, 3, dtype=torch.bool), 1)
    assert loss.item() == 0.0
    assert metadata["num_response_tokens"].item() == 0
    assert log_probs.grad.tolist() == [[0.0] * 3] * 2


# compute_sft_loss


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_sft_loss_is_the_mean_over_response_tokens(mask_dtype):
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]]).to(mask_dtype)
    loss = compute_sft_loss(Bigrams(TABLE), INPUT_IDS, LABELS, mask)
    assert loss.item() == pytest.approx((math.log(3) + math.log(4) + math.log(4)) / 3)


def test_sft_loss_gradient_matches_a_float64_loop():
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(4))
    input_ids = torch.tensor([[0, 1, 2, 3], [4, 4, 0, 1]])
    labels = torch.tensor([[1, 2, 3, 4], [4, 0, 1, 1]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]])
    model = Bigrams(table)
    loss = compute_sft_loss(model, input_ids, labels, mask)
    loss.backward()

    expected_loss, expected_gradient = 0.0, torch.zeros(5, 5, dtype=torch.float64)
    for token, label in [(2, 3), (3, 4), (4, 0)]:  # the three masked-in places, by hand
        expected_loss += reference_nll(table[token].tolist(), label) / 3
        for other in range(5):
            probability = math.exp(-reference_nll(table[token].tolist(), other))
            expected_gradient[token, other] += (probability - (other == label)) / 3
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    assert (model.table.grad - expected_gradient).norm() / expected_gradient.norm() <= 1e-6


def test_sft_loss_ignores_labels_outside_of_the_response():
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]])
    spoiled = LABELS.masked_fill(mask == 0, -100)
    assert compute_sft_loss(Bigrams(TABLE), INPUT_IDS, spoiled, mask).item() == pytest.approx(
        (math.log(3) + 2 * math.log(4)) / 3
    )


def test_sft_loss_of_a_bfloat16_model_is_float32():
    assert compute_sft_loss(Bigrams(TABLE).bfloat16(), INPUT_IDS, LABELS, LABELS >= 0).dtype == torch.float32


def test_sft_loss_refuses_an_empty_mask_instead_of_giving_nan():
    with pytest.raises(UserError, match=r"response_mask of shape \(2, 3\) is False everywhere"):
        compute_sft_loss(Bigrams(TABLE), INPUT_IDS, LABELS, torch.zeros(2, 3))


def test_functions_agree_on_a_transformers_model_and_ignore_right_padding():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = Qwen2ForCausalLM(config).eval()
    row = torch.tensor([[5, 6, 7, 8, 9]])
    padded = torch.cat([row, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 0, 0, 0]])
    loss = compute_sft_loss(model, padded[:, :-1], padded[:, 1:], mask)
    # The model on the bare row, position by position: 7 -> 8 and 8 -> 9 are the response.
    logits = model(row).logits[0].double()
    expected = [reference_nll(logits[2].tolist(), 8), reference_nll(logits[3].tolist(), 9)]
    assert loss.item() == pytest.approx(sum(expected) / 2, rel=1e-5)
    log_probs = get_response_log_probs(model, padded[:, :-1], padded[:, 1:])["log_probs"]
    assert log_probs[0, 2:4].tolist() == pytest.approx([-expected[0], -expected[1]], rel=1e-5)
