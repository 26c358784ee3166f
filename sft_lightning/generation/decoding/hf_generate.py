"""Generate answers with ``generate`` of transformers, for models that the decoding loop cannot run."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sft_lightning.generation.decoding.loop import Answer
from sft_lightning.generation.decoding.sampling import TokenSampler
from sft_lightning.generation.decoding.stopping import StopCondition

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HFGenerate:
    """Answers batches of prompts, each as one call of ``model.generate``.

    Args:
        model: In evaluation mode.
        sampler: Chooses the next tokens.
        stop_condition: Decides when answers end.
        eos_token_ids: The EOS tokens of the stop condition, which a model may need too.
        pad_token_id: Token id of padding.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        sampler: TokenSampler,
        stop_condition: StopCondition,
        eos_token_ids: Collection[int],
        pad_token_id: int,
    ) -> None:
        self._model = model
        self._sampler = sampler
        self._stop_condition = stop_condition
        self._config = GenerationConfig(
            max_new_tokens=stop_condition.max_new_tokens,
            do_sample=False,  # the logits processor samples
            use_cache=True,  # configs of models in training may disable it
            eos_token_id=sorted(eos_token_ids) or None,
            pad_token_id=pad_token_id,
        )

    def answer(self, prompts: Sequence[list[int]], numbers: Sequence[int]) -> list[Answer]:
        """Returns an answer to each prompt of token ids. ``numbers``: which answer of the evaluation each one is."""
        model, pad_token_id = self._model, self._config.pad_token_id
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        input_ids = torch.tensor(
            [[pad_token_id] * count + prompt for count, prompt in zip(padding, prompts, strict=True)]
        )
        attention_mask = (torch.arange(width) >= torch.tensor(padding)[:, None]).long()
        collector = _AnswerCollector(self._stop_condition, len(prompts))
        random_numbers = self._sampler.random_numbers(numbers, self._stop_condition.max_new_tokens, model.device)
        processor = _SamplingProcessor(self._sampler, random_numbers)
        own = model.generation_config
        model.generation_config = self._config  # the defaults that `generate` uses
        try:
            model.generate(  # type: ignore[operator]
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=self._config,
                logits_processor=LogitsProcessorList([processor]),
                stopping_criteria=StoppingCriteriaList([collector]),
                synced_gpus=False,  # fsdp_sync synchronizes
            )
        finally:
            model.generation_config = own
        entropies = torch.stack(processor.entropies, dim=1).tolist()
        for answer, row in zip(collector.answers, entropies, strict=True):
            answer.mean_entropy = sum(row[: len(answer.tokens)]) / len(answer.tokens)
        return collector.answers


class _SamplingProcessor(LogitsProcessor):
    """Samples a token for each row and masks all others."""

    def __init__(self, sampler: TokenSampler, random_numbers: Tensor) -> None:
        self.entropies: list[Tensor] = []
        self._sampler = sampler
        self._random_numbers = random_numbers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, entropies = self._sampler(scores, self._random_numbers[:, len(self.entropies)])
        self.entropies.append(entropies)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _AnswerCollector(StoppingCriteria):
    """Collects the tokens of each row until its answer ends."""

    def __init__(self, stop_condition: StopCondition, num_rows: int) -> None:
        self.answers = [Answer() for _ in range(num_rows)]
        self._stop_condition = stop_condition
        self._ended = [False] * num_rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self._ended[row]:
                answer = self.answers[row]
                answer.tokens.append(token)
                reason = self._stop_condition.reason(answer.tokens)
                if reason is not None:
                    answer.stop_reason, self._ended[row] = reason, True
        return torch.tensor(self._ended, device=input_ids.device)
