"""Test calls of the CUDA kernels with stand-ins of the same signatures, and the kernels themselves in gpu tests."""

import pytest
import torch

from sft_lightning.data.batch import Segment, Segments
from sft_lightning.models.attention.kernels import CUDA_KERNELS, attend_by_kernel, import_kernel, try_kernel
from sft_lightning.models.attention.segments import attend

TREE = [Segment(0, 6, -1), Segment(6, 10, 0), Segment(10, 15, 0), Segment(15, 22, -1)]


def heads(num_heads=4, num_key_heads=2):
    torch.manual_seed(0)
    return [torch.randn(1, count, 22, 8, requires_grad=True) for count in (num_heads, num_key_heads, num_key_heads)]


@pytest.mark.parametrize("window_tokens", [None, 3])
@pytest.mark.parametrize("num_key_heads", [2, 4])
@pytest.mark.parametrize("kernel", [*CUDA_KERNELS, "varlen of torch 2.11"])
def test_kernel_calls_equal_the_segment_loop(install, kernel, num_key_heads, window_tokens):
    install(kernel)
    segments, tensors = Segments.from_tree(TREE), heads(num_key_heads=num_key_heads)
    options = {"scale": 0.3, "window_tokens": window_tokens}
    got = attend_by_kernel(kernel.split()[0], *tensors, segments, **options)
    expected = attend(*tensors, segments, **options).transpose(1, 2)
    torch.testing.assert_close(got, expected)
    direction = torch.randn_like(got)
    for mine, reference in zip(
        torch.autograd.grad(got, tensors, direction), torch.autograd.grad(expected, tensors, direction), strict=True
    ):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_gets_every_option(install, kernel, deterministic):
    calls = []

    def record(query, *args, **options):
        calls.append(options)
        return query

    install(kernel, record)
    torch.use_deterministic_algorithms(deterministic)
    try:
        options = {"scale": 0.3, "dropout": 0.1, "window_tokens": 5, "softcap": 2.0}
        attend_by_kernel(kernel, *heads(), Segments.from_tree(TREE), **options)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = {"softmax_scale": 0.3, "causal": True, "window_size": (4, 0), "softcap": 2.0}
    expected["deterministic"] = deterministic
    if kernel == "flash_attention_2":
        expected["dropout_p"] = 0.1
    assert calls == [expected]


def test_the_trial_runs_forward_and_backward_with_the_models_heads(install):
    calls = []

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            calls.append((query.shape, key.shape, value.shape, query.dtype))
            ctx.save_for_backward(query, key, value)
            return query.clone()

        @staticmethod
        def backward(ctx, gradient):
            calls.append("backward")
            return ctx.saved_tensors

    def varlen_attn(query, key, value, *args, scale, window_size):
        return Attention.apply(query, key, value)

    install("varlen", varlen_attn)
    with torch.no_grad():  # as loading a model may be
        try_kernel("varlen", num_heads=6, num_key_heads=2, head_size=16, device="cpu")
    # 3 + 2 queries; the second segment sees the first, so that there are 3 + 5 keys.
    assert calls == [((5, 6, 16), (8, 2, 16), (8, 2, 16), torch.bfloat16), "backward"]


def test_the_trial_raises_the_error_of_the_kernel(install):
    def varlen_attn(query, key, value, *args, **options):
        raise RuntimeError("no kernel image is available")

    install("varlen", varlen_attn)
    with pytest.raises(RuntimeError, match="no kernel image"):
        try_kernel("varlen", num_heads=2, num_key_heads=1, head_size=8, device="cpu")


def test_the_trial_refuses_gradients_that_are_not_finite(install):
    install("varlen", lambda query, key, value, *args, **options: (query + key.sum() + value.sum()) * float("inf"))
    with pytest.raises(AssertionError, match="gradients are not finite"):
        try_kernel("varlen", num_heads=2, num_key_heads=1, head_size=8, device="cpu")


def test_torch_brings_varlen_attention():
    from torch.nn.attention.varlen import varlen_attn

    assert import_kernel("varlen") is varlen_attn


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", CUDA_KERNELS)
@pytest.mark.parametrize("window_tokens", [None, 40])
def test_kernels_equal_the_segment_loop_on_a_gpu(kernel, window_tokens):
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(kernel)
    if package:
        pytest.importorskip(package)
    tree = [Segment(0, 64, -1), Segment(64, 130, 0), Segment(130, 200, 0), Segment(200, 333, -1)]
    segments = Segments.from_tree(tree).to(torch.device("cuda"))
    torch.manual_seed(0)
    shapes = [(8, 64), (2, 64), (2, 64)]
    tensors = [torch.randn(1, h, 333, e, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h, e in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    got = attend_by_kernel(kernel, *tensors, segments, scale=0.125, window_tokens=window_tokens)
    expected = attend(*exact, segments, scale=0.125, window_tokens=window_tokens).transpose(1, 2)
    results = [got, *torch.autograd.grad(got.float().square().sum(), tensors)]
    references = [expected, *torch.autograd.grad(expected.square().sum(), exact)]
    for mine, reference in zip(results, references, strict=True):
        # bfloat16 has 8 bits of precision; probabilities and outputs are rounded to it.
        assert (mine.double() - reference).norm() <= 2e-2 * reference.norm()


@pytest.mark.gpu
def test_the_trial_passes_with_grouped_heads_on_a_gpu():
    try_kernel("varlen", num_heads=12, num_key_heads=2, head_size=128)
