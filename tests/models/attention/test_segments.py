"""Compare attention over segments with the formula in float64 and a mask over the whole row."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sft_lightning.data.batch import Segment, Segments
from sft_lightning.models.attention import segments as segment_attention
from sft_lightning.models.attention.segments import attend

# A preamble, followed by a prompt with two responses and by another row; then a row that shares nothing.
TREE = [Segment(0, 7, -1), Segment(7, 12, 0), Segment(12, 15, 1), Segment(15, 20, 1), Segment(20, 25, 0)]
TREE += [Segment(25, 36, -1)]
NUM_TOKENS = 36


@pytest.fixture(params=[4, 96], ids="blocks of {}".format)
def _blocks_of(request, monkeypatch):
    """Also with segments that are cut into several blocks of queries, the last one shorter."""
    monkeypatch.setattr(segment_attention, "_BLOCK_TOKENS", request.param)


def visible(window_tokens=None):
    """Returns shape [T, T], True where a query sees a key, by walking each token's chain of ancestors."""
    mask = torch.zeros(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool)
    for segment in TREE:
        chain, parent = list(range(segment.start, segment.end)), segment.parent
        while parent >= 0:
            chain = [*range(TREE[parent].start, TREE[parent].end), *chain]
            parent = TREE[parent].parent
        for query in range(segment.start, segment.end):
            keys = chain[: chain.index(query) + 1]
            mask[query, keys[-window_tokens:] if window_tokens else keys] = True
    return mask


def formula(query, key, value, *, scale, window_tokens=None, softcap=None):
    repeats = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(repeats, 1) for heads in (key, value))
    scores = torch.einsum("bhqe,bhke->bhqk", query, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~visible(window_tokens), -torch.inf).softmax(-1) @ value


def heads(num_query_heads=4, num_key_heads=2, size=16, value_size=16, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(num_query_heads, size), (num_key_heads, size), (num_key_heads, value_size)]
    return [torch.randn(1, n, NUM_TOKENS, e, dtype=torch.float64).to(dtype).requires_grad_() for n, e in shapes]


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return output


def outputs_and_gradients(function, tensors, **options):
    output = function(*tensors, **options)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    return [output, *torch.autograd.grad((output.double() * weights).sum(), tensors)]


def ours(query, key, value, **options):
    return attend(query, key, value, Segments.from_tree(TREE), **options)


# Rounding of the dtype, a few operations deep: values are of size 1.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.usefixtures("_blocks_of")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_key_heads", [4, 2, 1])
def test_output_and_gradients_equal_the_formula(dtype, num_key_heads):
    tensors = heads(num_key_heads=num_key_heads, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    got = outputs_and_gradients(ours, tensors, scale=0.3)
    expected = outputs_and_gradients(formula, exact, scale=0.3)
    for mine, reference in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - reference).norm() <= TOLERANCE[dtype] * reference.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"window_tokens": 4},
        {"window_tokens": 2},
        {"window_tokens": 100},
        {"softcap": 0.7},
        {"softcap": 2.0, "window_tokens": 6},
    ],
    ids=str,
)
def test_windows_and_soft_caps_are_honored(options):
    got = outputs_and_gradients(ours, heads(), scale=0.5, **options)
    expected = outputs_and_gradients(formula, heads(), scale=0.5, **options)
    for mine, reference in zip(got, expected, strict=True):
        assert (mine - reference).norm() <= 1e-12 * reference.norm()


def test_values_may_have_another_size_than_keys():
    got = outputs_and_gradients(ours, heads(value_size=8), scale=0.5)
    expected = outputs_and_gradients(formula, heads(value_size=8), scale=0.5)
    for mine, reference in zip(got, expected, strict=True):
        assert (mine - reference).norm() <= 1e-12 * reference.norm()


def test_autocast_decides_the_dtype_of_the_output_and_nothing_else():
    tensors = [tensor.detach().float().requires_grad_() for tensor in heads()]
    plain = ours(*tensors, scale=0.3)
    expected = torch.autograd.grad(plain.sum(), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(*tensors, scale=0.3)
        gradients = torch.autograd.grad(output.float().sum(), tensors)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, plain.bfloat16())
    assert all(torch.equal(mine, reference) for mine, reference in zip(gradients, expected, strict=True))


def test_large_scores_stay_finite():
    query, key, value = (tensor.detach().float() * 100 for tensor in heads())
    output = ours(query, key, value, scale=1.0)
    reference = formula(query.double(), key.double(), value.double(), scale=1.0)
    # Scores of 10,000 have an absolute rounding of 1e-3 in float32.
    assert (output.double() - reference).norm() <= 1e-2 * reference.norm()


def test_dropout_drops_and_scales_up():
    query, key, value = (tensor.detach() for tensor in heads())
    torch.manual_seed(0)
    dropped = torch.stack([ours(query, key, value, scale=0.3, dropout=0.5) for _ in range(400)])
    kept = ours(query, key, value, scale=0.3)
    assert not torch.equal(dropped[0], dropped[1])
    # The mean over 400 draws of weights that are 0 or doubled.
    assert (dropped.mean(0) - kept).abs().mean() < 0.05


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_heads_may_lie_in_memory_in_any_order(which, num_key_heads):
    tensors = [tensor.detach() for tensor in heads(num_key_heads=num_key_heads)]
    expected = ours(*tensors, scale=0.3)
    tensors[which] = tensors[which].transpose(2, 3).contiguous().transpose(2, 3)
    assert tensors[which].stride(-1) != 1
    torch.testing.assert_close(ours(*tensors, scale=0.3), expected, rtol=1e-12, atol=1e-12)


def test_backward_of_an_expanded_gradient():
    """The gradient of a sum is one number seen from everywhere: strides of 0."""
    tensors = heads()
    got = torch.autograd.grad(ours(*tensors, scale=0.3).sum(), tensors)
    expected = torch.autograd.grad(formula(*tensors, scale=0.3).sum(), tensors)
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)


def test_no_tensor_grows_with_the_square_of_the_row():
    segments = Segments.from_tree([Segment(0, 1000, -1)])
    tensors = [torch.randn(1, count, 1000, 8, requires_grad=True) for count in (4, 2, 2)]
    with LargestTensor() as largest:
        attend(*tensors, segments, scale=0.3).sum().backward()
    # A block has at most 96 queries in 4 heads, and sees at most 1,000 keys.
    assert 0 < largest.num_elements <= 96 * 4 * 1000
