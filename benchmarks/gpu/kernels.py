"""Which kernels run, how exact they are against float64, and what a layer's attention and a new shape cost."""

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from gpu import flex
from gpu.session import Session
from torch import Tensor, nn
from transformers import AttentionInterface, Qwen2Config

from sft_lightning.data.batch import Segments, Span
from sft_lightning.errors import UserError
from sft_lightning.models.attention import segments as segment_attention
from sft_lightning.models.attention.kernels import CUDA_KERNELS
from sft_lightning.models.attention.selection import choose_attention

_PACKAGES = ("torch", "transformers", "lightning", "triton", "accelerate", "flash-attn")


def run(session: Session) -> None:
    session.put("environment", environment(session))
    flex.register()
    obstacles = {kernel: choose(session, kernel) for kernel in ("auto", *CUDA_KERNELS)}
    session.put("attention that each choice gives", obstacles)
    found = [obstacle for obstacle in dict.fromkeys(obstacles.values()) if obstacle.startswith("sft_")]
    names = list(dict.fromkeys([*found, "sft_segments"]))
    measure = Kernels(session)
    for window in (None, 40):
        for name in names:
            session.measure(f"errors of {name}, window {window}", lambda n=name, w=window: measure.errors(n, w))
    session.measure("first and later calls on new shapes", measure.new_shapes)
    for name in names:
        session.measure(f"a layer of 32 rows, {name}", lambda n=name: measure.layer_milliseconds(n))
    session.measure("errors of sft_flex, window None", lambda: measure.errors("sft_flex", None), needs_seconds=12)
    session.measure("a layer of 32 rows, sft_flex", lambda: measure.layer_milliseconds("sft_flex"), needs_seconds=8)


def environment(session: Session) -> dict[str, Any]:
    versions: dict[str, Any] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    versions["torch"] = torch.__version__
    if not session.tiny:
        versions |= {"gpu": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
    return versions


def choose(session: Session, choice: Any) -> str:
    """Returns the implementation that Qwen2.5-1.5B gets, or why it cannot have this one."""
    config = Qwen2Config(hidden_size=1536, num_attention_heads=12, num_key_value_heads=2)
    try:
        return choose_attention(config, choice, device_type=session.device, half_precision=True)
    except UserError as error:
        return str(error)


def gsm8k_like_spans(num_rows: int, seed: int, scale: float) -> list[Span]:
    """Returns a preamble of 83 tokens with ``num_rows`` children of GSM8K's lengths."""
    draw = np.random.default_rng(seed)
    spans = [Span(0, max(2, int(83 * scale)), -1)]
    for _ in range(num_rows):
        length = max(2, int(np.exp(draw.normal(5.05, 0.35)) * scale))
        spans.append(Span(spans[-1].end, spans[-1].end + length, 0))
    return spans


class Kernels:
    """Attention of Qwen2.5-1.5B's heads: 12 query heads and 2 key heads of 128 dimensions."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._num_heads, self._num_key_heads, self._head_size = (4, 2, 16) if session.tiny else (12, 2, 128)
        self._scale = self._head_size**-0.5
        torch.manual_seed(0)
        scale = 0.1 if session.tiny else 1.0
        spans = gsm8k_like_spans(session.size(12), 0, scale)
        # A child of a single token two levels down.
        end, last = spans[-1].end, len(spans) - 1
        self._segments = _filled_up([*spans, Span(end, end + 1, last)]).to(torch.device(session.device))
        self._heads = self._random_heads(self._segments.spans[-1].end)
        self._direction = torch.randn(self._heads[0].shape, device=session.device).transpose(1, 2)
        spans = gsm8k_like_spans(session.size(32), 1, scale)
        self._wide = _filled_up(spans).to(torch.device(session.device))

    def errors(self, name: str, window: int | None) -> dict[str, Any]:
        """Returns relative errors of output and gradients against float64, and whether two runs give the same bits."""
        exact = [heads.detach().double().requires_grad_() for heads in self._heads]
        output = segment_attention.attend(*exact, self._segments, scale=self._scale, window_tokens=window)
        references = _with_gradients(output.transpose(1, 2), exact, self._direction.double())
        first, second = (
            _with_gradients(self._attend(name, self._heads, self._segments, window), self._heads, self._direction)
            for _ in range(2)
        )
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(first, references, strict=True)]
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        return dict(zip(("output", "query", "key", "value"), errors, strict=True)) | {"same_bits_twice": same}

    def layer_milliseconds(self, name: str) -> dict[str, float]:
        """Returns the time of one layer's attention, forward and backward, for a micro-batch of 32 rows."""
        heads = self._random_heads(self._wide.spans[-1].end)

        def layer() -> None:
            output = self._attend(name, heads, self._wide, None)
            torch.autograd.grad(output, heads, torch.ones_like(output))

        first = self._milliseconds(layer)
        later = [self._milliseconds(layer) for _ in range(4)]
        return {"tokens": self._wide.spans[-1].end, "first_ms": first, "ms": statistics.median(later)}

    def new_shapes(self) -> dict[str, list[float]]:
        """Returns milliseconds of padded rows of lengths not seen before, and of a decoded token behind as many."""
        heads = {length: self._random_heads(length) for length in (101, 131, 163, 197, 229)}
        attend = AttentionInterface()["sft_segments"]
        module = nn.Module()
        module.num_key_value_groups = self._num_heads // self._num_key_heads

        def train(length: int) -> None:
            output, _ = attend(module, *heads[length], None, scaling=self._scale)
            output.sum().backward()

        def decode(length: int) -> None:
            query, key, value = (tensor.detach() for tensor in heads[length])
            mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=query.device)
            attend(module, query[:, :, -1:], key, value, mask, scaling=self._scale)

        calls: dict[str, Callable[[int], None]] = {"training": train, "decoding": decode}
        result = {}
        for name, call in calls.items():
            result[f"{name}, first ms"] = [self._milliseconds(lambda n=n, c=call: c(n)) for n in heads]
            result[f"{name}, again ms"] = [self._milliseconds(lambda n=n, c=call: c(n)) for n in heads]
        return result

    def _attend(self, name: str, heads: list[Tensor], segments: Segments, window: int | None) -> Tensor:
        function = AttentionInterface()[name]
        output, _ = function(nn.Module(), *heads, None, segments=segments, scaling=self._scale, sliding_window=window)
        return output

    def _random_heads(self, num_tokens: int) -> list[Tensor]:
        options = {"device": self._session.device, "dtype": torch.bfloat16, "requires_grad": True}
        counts = (self._num_heads, self._num_key_heads, self._num_key_heads)
        return [torch.randn(1, count, num_tokens, self._head_size, **options) for count in counts]

    def _milliseconds(self, function: Callable[[], None]) -> float:
        self._session.wait()
        begun = time.perf_counter()
        function()
        self._session.wait()
        return round(1e3 * (time.perf_counter() - begun), 3)


def _filled_up(spans: list[Span]) -> Segments:
    """Returns the segments with one more row up to a multiple of 128 tokens, which FlexAttention needs."""
    end = spans[-1].end
    return Segments.from_spans([*spans, Span(end, end + 128 - end % 128, -1)])


def _with_gradients(output: Tensor, heads: list[Tensor], direction: Tensor) -> list[Tensor]:
    return [output, *torch.autograd.grad((output.to(direction.dtype) * direction).sum(), heads)]
