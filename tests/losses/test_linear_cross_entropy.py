import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sft_lightning.losses.functional import compute_entropy
from sft_lightning.losses.linear_cross_entropy import _budget_bytes, _gradient_unit, linear_cross_entropy

M, V, D = 13, 192, 24
FLOAT32_ROW_BYTES = 4 * V
LOG_8 = math.log(8)


class Problem:
    """Inputs whose gradients are dense and uneven: labels repeat, weights differ, logits are far from uniform."""

    def __init__(self, dtype=torch.float32, *, num_labels=M, vocabulary=V, with_bias=False, device="cpu"):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape, scale=1.0):
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
            return values.to(device, dtype).requires_grad_()

        self.hidden = normal(num_labels, D)
        self.weight = normal(vocabulary, D, scale=0.5)
        self.bias = normal(vocabulary) if with_bias else None
        self.labels = torch.randint(0, vocabulary // 2, (num_labels,), generator=generator).to(device)
        self.loss_weights = (torch.rand(num_labels, generator=generator, dtype=torch.float64) / num_labels).to(device)

    @property
    def arguments(self):
        return self.hidden, self.weight, self.bias, self.labels, self.loss_weights

    @property
    def parameters(self):
        return [tensor for tensor in (self.hidden, self.weight, self.bias) if tensor is not None]

    def gradients(self, loss):
        loss.backward()
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients

    def plain(self, dtype=None, *, softcap=None, scale=None, matmul=F.linear):
        """The loss of whole [M, V] logits: the truth in float64, or the usual computation in the problem's dtype."""
        hidden, weight, bias = (t if t is None or dtype is None else t.to(dtype) for t in self.arguments[:3])
        logits = matmul(hidden, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if scale is not None:
            logits = logits * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        nll = -torch.log_softmax(logits, -1).gather(-1, self.labels[:, None]).squeeze(-1)
        return (nll * self.loss_weights.to(nll.dtype)).sum(), nll, logits


def relative_error(values, truth):
    return ((values.double() - truth.double()).norm() / truth.double().norm()).item()


class CreatedTensors(TorchDispatchMode):
    """Counts calls of operators, and the tensors that they allocate, by shape."""

    def __init__(self):
        super().__init__()
        # Weak, so that autograd may take over a gradient instead of copying it, as it does without us.
        self.shapes, self.calls, self.storages = Counter(), Counter(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in self.unknown((args, kwargs)):
            self.storages[tensor.untyped_storage().data_ptr()] = StorageWeakRef(tensor.untyped_storage())
        output = function(*args, **kwargs)
        self.calls[function.overloadpacket.__name__] += 1
        for tensor in self.unknown(output):
            self.storages[tensor.untyped_storage().data_ptr()] = StorageWeakRef(tensor.untyped_storage())
            self.shapes[tuple(tensor.shape)] += 1
        return output

    def unknown(self, tree):
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor):
                known = self.storages.get(tensor.untyped_storage().data_ptr())
                if known is None or known.expired():
                    yield tensor


# Values and gradients


def test_loss_and_gradients_of_a_distribution_worked_out_by_hand():
    # The logits are 0, log 2, log 5: probabilities 1/8, 2/8, 5/8. Weight 2 at the label 1, in the loss and in each row.
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], requires_grad=True)
    losses = linear_cross_entropy(
        hidden, weight, None, torch.tensor([1]), torch.tensor([2.0], dtype=torch.float64), with_entropy=True
    )
    losses.weighted_sum.backward()
    assert losses.weighted_sum.item() == pytest.approx(2 * math.log(4))
    assert losses.nll.tolist() == pytest.approx([math.log(4)])
    assert losses.correct.tolist() == [False]
    assert losses.entropy.tolist() == pytest.approx([LOG_8 / 8 + math.log(4) / 4 + math.log(8 / 5) * 5 / 8])
    torch.testing.assert_close(weight.grad, torch.tensor([[2 / 8], [4 / 8 - 2], [10 / 8]]))
    torch.testing.assert_close(hidden.grad, torch.tensor([[math.log(2) * (4 / 8 - 2) + math.log(5) * 10 / 8]]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "shape_of_logits", [{}, {"softcap": 3.0}, {"scale": 0.25}, {"softcap": 5.0, "scale": 1.5}], ids=str
)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_loss_and_gradients_are_those_of_the_whole_logits(dtype, tolerance, with_bias, shape_of_logits, with_entropy):
    """Tolerances: 1e-5 for float32 (measured 3e-7), about a hundred units in the last place for float64."""
    problem = Problem(dtype, with_bias=with_bias)
    loss, nll, logits = problem.plain(torch.float64, **shape_of_logits)
    truth = problem.gradients(loss)
    losses = linear_cross_entropy(
        *problem.arguments, **shape_of_logits, with_entropy=with_entropy, chunk_bytes=5 * FLOAT32_ROW_BYTES
    )
    assert losses.weighted_sum.dtype == losses.nll.dtype == dtype
    assert losses.weighted_sum.item() == pytest.approx(loss.item(), rel=tolerance)
    assert relative_error(losses.nll, nll) < tolerance
    assert torch.equal(losses.correct, logits.argmax(-1) == problem.labels)
    if with_entropy:
        assert relative_error(losses.entropy, compute_entropy(logits)) < tolerance
    for gradient, expected in zip(problem.gradients(losses.weighted_sum), truth, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, expected) < tolerance


@pytest.mark.parametrize(
    ("chunk_rows", "num_chunks"), [(0.5, 13), (1, 13), (4, 4), (6.9, 3), (12, 2), (13, 1), (1000, 1)]
)
def test_chunks_of_any_height_give_the_same(chunk_rows, num_chunks):
    problem = Problem()
    loss, nll, _ = problem.plain(torch.float64)
    truth = problem.gradients(loss)
    with CreatedTensors() as created:
        losses = linear_cross_entropy(*problem.arguments, chunk_bytes=int(chunk_rows * FLOAT32_ROW_BYTES))
    assert created.calls["softmax"] == num_chunks
    assert relative_error(losses.nll, nll) < 1e-6
    for gradient, expected in zip(problem.gradients(losses.weighted_sum), truth, strict=True):
        assert relative_error(gradient, expected) < 1e-6


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 200])
def test_any_vocabulary_size_works(vocabulary):
    problem = Problem(vocabulary=vocabulary) if vocabulary > 1 else Problem(vocabulary=2)
    loss, nll, logits = problem.plain(torch.float64)
    truth = problem.gradients(loss)
    losses = linear_cross_entropy(*problem.arguments)
    assert relative_error(losses.nll, nll) < 1e-6
    assert torch.equal(losses.correct, logits.argmax(-1) == problem.labels)
    for gradient, expected in zip(problem.gradients(losses.weighted_sum), truth, strict=True):
        assert relative_error(gradient, expected) < 1e-6


def test_the_gradient_scales_with_the_upstream_gradient():
    problem = Problem()
    once = problem.gradients(linear_cross_entropy(*problem.arguments).weighted_sum)
    scaled = problem.gradients(linear_cross_entropy(*problem.arguments).weighted_sum * -6.0)
    for gradient, expected in zip(scaled, once, strict=True):
        torch.testing.assert_close(gradient, -6.0 * expected)


def test_gradients_add_to_those_that_are_there():
    problem = Problem()
    once = problem.gradients(linear_cross_entropy(*problem.arguments).weighted_sum)
    problem.weight.grad = torch.ones_like(problem.weight)
    _, twice = problem.gradients(linear_cross_entropy(*problem.arguments).weighted_sum)
    torch.testing.assert_close(twice, 1 + once[1])


def test_a_weight_that_is_also_the_embedding_gets_both_gradients():
    problem = Problem()
    ids = problem.labels.flip(0)
    plain = F.cross_entropy(F.linear(F.embedding(ids, problem.weight), problem.weight), problem.labels)
    plain.backward()
    expected, problem.weight.grad = problem.weight.grad, None
    weights = torch.full((M,), 1 / M, dtype=torch.float64)
    hidden = F.embedding(ids, problem.weight)
    linear_cross_entropy(hidden, problem.weight, None, problem.labels, weights).weighted_sum.backward()
    assert relative_error(problem.weight.grad, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_labels_of_weight_zero_give_zero_gradients(dtype):
    problem = Problem(dtype, with_bias=True)
    problem.loss_weights.zero_()
    losses = linear_cross_entropy(*problem.arguments)
    assert losses.weighted_sum.item() == 0.0
    for gradient in problem.gradients(losses.weighted_sum):
        assert not gradient.any()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_logits_far_from_zero_lose_no_digits(offset):
    # Two equal logits share the probability; the third is 2 ** -150 of it, too little for a float32 probability.
    far = 150 * math.log(2)
    bias = torch.tensor([offset, offset, offset - far], requires_grad=True)
    losses = linear_cross_entropy(
        torch.ones(2, 1),
        torch.zeros(3, 1),
        bias,
        torch.tensor([1, 2]),
        torch.ones(2, dtype=torch.float64),
        with_entropy=True,
    )
    losses.weighted_sum.backward()
    # The bias itself is rounded at 1e4, to 1e-3.
    assert losses.nll.tolist() == pytest.approx([math.log(2), math.log(2) + far], abs=1e-3)
    assert losses.nll[0].item() == pytest.approx(math.log(2), rel=1e-6)
    assert losses.entropy.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-6)
    assert bias.grad.tolist() == [1.0, 0.0, -1.0]


def test_tokens_with_a_bias_of_minus_infinity_do_not_count():
    problem = Problem(with_bias=True)
    problem.bias.data[V // 2 :] = -math.inf
    loss, _, logits = problem.plain(torch.float64)
    truth = problem.gradients(loss)
    losses = linear_cross_entropy(*problem.arguments, with_entropy=True)
    assert relative_error(losses.entropy, compute_entropy(logits)) < 1e-6
    for gradient, expected in zip(problem.gradients(losses.weighted_sum), truth, strict=True):
        assert relative_error(gradient, expected) < 1e-6


def test_the_first_of_equally_likely_tokens_is_the_predicted_one():
    weight = torch.zeros(256, 1)
    weight[[70, 100, 200]] = 1.0  # two in one block of the search, one in another
    labels = torch.tensor([70, 100, 200, 0])
    losses = linear_cross_entropy(torch.ones(4, 1), weight, None, labels, torch.ones(4, dtype=torch.float64))
    assert losses.correct.tolist() == [True, False, False, False]


def test_a_label_outside_of_the_vocabulary_is_refused():
    problem = Problem()
    problem.labels[3] = V
    with pytest.raises(RuntimeError, match=str(V)):
        linear_cross_entropy(*problem.arguments)


# Low precision: measured against the truth, beside what the whole logits give in the same precision


def errors(gradients, truth):
    return [relative_error(gradient, expected) for gradient, expected in zip(gradients, truth, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk_rows", [8, 4096])
def test_low_precision_is_as_exact_as_whole_logits(dtype, autocast, chunk_rows):
    """A factor of 1.1: both round logits and their gradients once, but sum in another order."""
    problem = Problem(torch.float32 if autocast else dtype, num_labels=256, with_bias=True)
    truth_loss, truth_nll, _ = problem.plain(torch.float64)
    truth = problem.gradients(truth_loss)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        loss, nll, _ = problem.plain()
        losses = linear_cross_entropy(*problem.arguments, chunk_bytes=chunk_rows * FLOAT32_ROW_BYTES)
    # A loss scale, as float16 needs it in the plain computation.
    naive = [gradient.double() / 2**10 for gradient in problem.gradients(loss * 2**10)]
    own = problem.gradients(losses.weighted_sum * 2**10)
    assert losses.nll.dtype == losses.weighted_sum.dtype == torch.float32
    assert relative_error(losses.nll, truth_nll) <= 1.1 * relative_error(nll, truth_nll)
    assert [gradient.dtype for gradient in own] == [parameter.dtype for parameter in problem.parameters]
    for error, allowed in zip(errors([g.double() / 2**10 for g in own], truth), errors(naive, truth), strict=True):
        assert error <= 1.1 * allowed


def test_many_chunks_round_the_weight_gradient_no_more():
    """In bfloat16 a sum of 512 equal rows would stop growing at 256 of them."""
    hidden = torch.ones(512, D, dtype=torch.bfloat16)
    weight = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(512, dtype=torch.int64)
    weights = torch.full((512,), 2.0**-9, dtype=torch.float64)
    linear_cross_entropy(hidden, weight, None, labels, weights, chunk_bytes=FLOAT32_ROW_BYTES).weighted_sum.backward()
    # Each row gives the same, 1 / V to all but the label; half a unit of bfloat16's last place is 2 ** -9.
    assert weight.grad[0].tolist() == pytest.approx([1 / V - 1] * D, rel=2**-8)
    assert weight.grad[1].tolist() == pytest.approx([1 / V] * D, rel=2**-8)


def test_float16_gradients_do_not_underflow_before_the_loss_scale_arrives():
    """Uniform probabilities of 1 / 192 and weights of 1e-6 are products of 5e-9, below float16's 6e-8."""
    problem = Problem(torch.float16, num_labels=64)
    problem.loss_weights.mul_(64e-6)
    problem.weight.data.mul_(1e-2)
    truth = problem.gradients(problem.plain(torch.float64)[0] * 2.0**16)
    losses = linear_cross_entropy(*problem.arguments, chunk_bytes=10 * FLOAT32_ROW_BYTES)
    for error in errors(problem.gradients(losses.weighted_sum * 2.0**16), truth):
        assert error < 2e-3  # some units of float16's last place, 2 ** -11


def test_float16_gradients_do_not_overflow_for_equal_labels():
    hidden = torch.full((512, D), 8.0, dtype=torch.float16)
    weight = torch.zeros(V, D, dtype=torch.float16, requires_grad=True)
    weights = torch.full((512,), 2.0**-9, dtype=torch.float64)
    losses = linear_cross_entropy(hidden, weight, None, torch.zeros(512, dtype=torch.int64), weights)
    losses.weighted_sum.backward()
    assert weight.grad[0].tolist() == pytest.approx([8 * (1 / V - 1)] * D, rel=2**-9)


def test_autocast_does_not_touch_float64():
    problem = Problem(torch.float64)
    truth = problem.gradients(problem.plain(torch.float64)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = linear_cross_entropy(*problem.arguments)
    assert max(errors(problem.gradients(losses.weighted_sum), truth)) < 1e-13


# Tensors and gradients that are computed


def test_only_chunk_logits_and_two_gradients_are_large():
    problem = Problem(num_labels=64)
    with CreatedTensors() as created:
        linear_cross_entropy(*problem.arguments, chunk_bytes=8 * FLOAT32_ROW_BYTES).weighted_sum.backward()
    largest = sorted(created.shapes, key=math.prod)[-3:]
    assert largest == [(8, V), (64, D), (V, D)]  # a chunk's logits, and the two gradients
    assert [created.shapes[shape] for shape in largest] == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "num_chunks_of_logits"),
    [({"with_entropy": True}, 2), ({"softcap": 2.0}, 2), ({"softcap": 2.0, "with_entropy": True}, 3)],
    ids=str,
)
def test_buffers_are_shared_by_all_chunks(options, num_chunks_of_logits):
    problem = Problem(num_labels=64)
    with CreatedTensors() as created:
        linear_cross_entropy(*problem.arguments, **options, chunk_bytes=8 * FLOAT32_ROW_BYTES)
    assert created.shapes[(8, V)] == num_chunks_of_logits


def test_the_hidden_states_are_not_multiplied_twice():
    problem = Problem()
    with CreatedTensors() as created:
        linear_cross_entropy(*problem.arguments).weighted_sum.backward()
    assert created.calls["mm"] + created.calls["addmm_"] == 3  # logits and two gradients


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_no_gradient_and_no_memory(frozen):
    problem = Problem(with_bias=True)
    truth = dict(zip(("hidden", "weight", "bias"), problem.gradients(problem.plain(torch.float64)[0]), strict=True))
    getattr(problem, frozen).requires_grad_(False)
    with CreatedTensors() as created:
        linear_cross_entropy(*problem.arguments).weighted_sum.backward()
    assert created.shapes[tuple(getattr(problem, frozen).shape)] == 0
    for name, expected in truth.items():
        gradient = getattr(problem, name).grad
        assert gradient is None if name == frozen else relative_error(gradient, expected) < 1e-6


def test_without_gradients_only_the_loss_is_computed():
    problem = Problem(num_labels=64)
    loss, nll, _ = problem.plain(torch.float64)
    with torch.no_grad(), CreatedTensors() as created:
        losses = linear_cross_entropy(*problem.arguments, softcap=None, chunk_bytes=8 * FLOAT32_ROW_BYTES)
    assert not losses.weighted_sum.requires_grad
    assert created.shapes[(V, D)] == created.shapes[(64, D)] == 0
    assert created.calls["mm"] == 8
    assert losses.weighted_sum.item() == pytest.approx(loss.item())
    assert relative_error(losses.nll, nll) < 1e-6


def test_only_the_sum_has_a_gradient_and_entropy_is_optional():
    losses = linear_cross_entropy(*Problem().arguments)
    assert losses.weighted_sum.requires_grad
    assert not losses.nll.requires_grad
    assert losses.entropy is None


def test_a_second_backward_pass_is_refused():
    loss = linear_cross_entropy(*Problem().arguments).weighted_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()


def test_a_second_derivative_is_refused():
    problem = Problem()
    loss = linear_cross_entropy(*problem.arguments).weighted_sum.square()
    (gradient,) = torch.autograd.grad(loss, problem.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_deterministic_algorithms_give_the_same_bits():
    problem = Problem(torch.bfloat16, num_labels=64)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            losses = linear_cross_entropy(*problem.arguments, with_entropy=True, chunk_bytes=9 * FLOAT32_ROW_BYTES)
            runs.append([*losses[1:], *problem.gradients(losses.weighted_sum)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *runs))


class HeadedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, inputs, labels, loss_weights):
        hidden = torch.tanh(self.body(inputs))
        return linear_cross_entropy(hidden, self.head.weight, self.head.bias, labels, loss_weights, with_entropy=True)


@pytest.mark.slow
def test_a_compiled_model_agrees_for_every_number_of_labels():
    torch.manual_seed(0)
    model = HeadedModel()
    compiled = torch.compile(model)
    for num_labels in (10, 12, 7, 30):
        problem = Problem(num_labels=num_labels)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            losses = run(problem.hidden.detach(), problem.labels, problem.loss_weights)
            losses.weighted_sum.backward()
            results.append([losses.weighted_sum, *losses[1:], *(p.grad.clone() for p in model.parameters())])
        for own, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(own, expected)


def test_float32_weights_of_zero_make_no_infinite_unit():
    """Apple's GPUs have no float64, and an empty micro-batch's only weight is 0."""
    assert math.isfinite(_gradient_unit(torch.zeros(1), torch.float16))


@pytest.mark.parametrize(
    ("device", "total_gib", "budget_mib"), [("cpu", 0, 256), ("cuda", 8, 256), ("cuda", 24, 384), ("cuda", 80, 1280)]
)
def test_a_large_gpu_computes_larger_chunks(monkeypatch, device, total_gib, budget_mib):
    properties = SimpleNamespace(total_memory=total_gib * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    assert _budget_bytes(torch.device(device)) == budget_mib * 2**20


def test_a_cpu_computes_at_most_768_rows_at_once():
    problem = Problem(num_labels=1600)
    with CreatedTensors() as created:
        losses = linear_cross_entropy(*problem.arguments)
    # 1,600 rows in three even chunks: the buffer that they share is the only tensor with a row of logits a label.
    assert {shape for shape in created.shapes if shape[-1:] == (V,) and len(shape) == 2 and shape[0] > D} == {(534, V)}
    truth = problem.gradients(problem.plain(torch.float64)[0])
    assert max(errors(problem.gradients(losses.weighted_sum), truth)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "with_entropy": True}], ids=str)
def test_a_cuda_device_is_as_exact_as_whole_logits(dtype, options):
    problem = Problem(dtype, num_labels=512, vocabulary=2048, with_bias=True, device="cuda")
    softcap = options.get("softcap")
    truth_loss, truth_nll, _ = problem.plain(torch.float64, softcap=softcap)
    truth = problem.gradients(truth_loss * 2**10)
    loss, nll, _ = problem.plain(softcap=softcap)
    naive = errors(problem.gradients(loss * 2**10), truth)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = linear_cross_entropy(*problem.arguments, **options, chunk_bytes=100 * 4 * 2048)
        own = problem.gradients(losses.weighted_sum * 2**10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Beside the factor, some units of float32's last place for sums in another order.
    assert relative_error(losses.nll, truth_nll) <= 1.1 * relative_error(nll, truth_nll) + 1e-6
    for error, allowed in zip(errors(own, truth), naive, strict=True):
        assert error <= 1.1 * allowed + 1e-6
