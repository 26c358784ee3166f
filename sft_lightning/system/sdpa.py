"""Keep cuDNN out of torch's ``scaled_dot_product_attention``.

For a shape that it has not seen, cuDNN first builds a plan, which takes 75 to 140 ms on an H100 (2 s for the first).
Almost every micro-batch and every decoded token has a new shape; torch's other kernels take any shape at once.
"""

from contextlib import AbstractContextManager, nullcontext

from torch.nn.attention import SDPBackend, sdpa_kernel

_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def without_cudnn_attention(*, is_cuda: bool) -> AbstractContextManager[None]:
    """Returns a context in which ``scaled_dot_product_attention`` does not use cuDNN; a null context without CUDA.

    The choice of kernels is global to the process, so leave the context before running anybody else's code.
    ``torch.compile`` traces through it.
    """
    return sdpa_kernel(_BACKENDS) if is_cuda else nullcontext()
