import pytest
import torch
import torch.nn.functional as F

from sft_lightning.system.sdpa import without_cudnn_attention


def enabled():
    backends = torch.backends.cuda
    return {
        "cudnn": backends.cudnn_sdp_enabled(),
        "flash": backends.flash_sdp_enabled(),
        "efficient": backends.mem_efficient_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
    }


@pytest.fixture(autouse=True)
def _flags_restored():
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    torch.backends.cuda.enable_flash_sdp(before[1])


def test_only_cudnn_is_off_inside():
    torch.backends.cuda.enable_cudnn_sdp(True)
    with without_cudnn_attention(is_cuda=True):
        assert enabled() == {"cudnn": False, "flash": True, "efficient": True, "math": True}


@pytest.mark.parametrize("cudnn", [True, False])
def test_the_process_gets_its_own_choice_back(cudnn):
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.backends.cuda.enable_flash_sdp(False)
    before = enabled()
    with pytest.raises(ZeroDivisionError), without_cudnn_attention(is_cuda=True):
        1 / 0  # noqa: B018
    assert enabled() == before


def test_nothing_changes_without_cuda():
    torch.backends.cuda.enable_cudnn_sdp(True)
    with without_cudnn_attention(is_cuda=False):
        assert torch.backends.cuda.cudnn_sdp_enabled()


def test_torch_compile_traces_through_it():
    seen = []

    def attend(query):
        with without_cudnn_attention(is_cuda=True):
            return F.scaled_dot_product_attention(query, query, query, is_causal=True)

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    query = torch.randn(1, 2, 5, 8)
    got = torch.compile(attend, backend=backend, fullgraph=True)(query)
    assert len(seen) == 1
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, query, query, is_causal=True))
