import math

import pytest
import torch

from sft_lightning.losses.token_loss import TokenLoss

LABELS = torch.tensor([0, 3])
WEIGHTS = torch.tensor([0.5, 0.25], dtype=torch.float64)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_uniform_logits_cost_the_log_of_the_vocabulary(with_entropy):
    hidden, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    for losses in (
        TokenLoss().from_hidden(hidden, weight, None, LABELS, WEIGHTS, with_entropy=with_entropy),
        TokenLoss().from_logits(hidden @ weight.T, LABELS, WEIGHTS, with_entropy=with_entropy),
    ):
        assert losses.weighted_sum.item() == pytest.approx(0.75 * math.log(4))
        assert losses.nll.tolist() == pytest.approx([math.log(4)] * 2)
        assert losses.correct.tolist() == [True, False]
        assert (
            losses.entropy is None if not with_entropy else losses.entropy.tolist() == pytest.approx([math.log(4)] * 2)
        )


def test_hidden_states_and_logits_give_the_same_losses_and_gradients():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    gradients = []
    for losses in (
        TokenLoss().from_hidden(hidden, weight, None, LABELS, WEIGHTS, scale=0.5, softcap=2.0),
        TokenLoss().from_logits(2.0 * torch.tanh(0.5 * (hidden @ weight.T) / 2.0), LABELS, WEIGHTS),
    ):
        hidden.grad = None
        losses.weighted_sum.backward()
        gradients.append((losses.nll, hidden.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)
