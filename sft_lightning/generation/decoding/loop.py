"""Decode batches: compute a common prefix once, drop finished rows, synchronize with the host once per step.

Prompts of different lengths are padded between the prefix and their own tokens. Padding is masked and has no position.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer, GenerationMixin

from sft_lightning.generation.decoding.kv_cache import SPARE_SLOTS, KVCache
from sft_lightning.generation.decoding.sampling import TokenSampler
from sft_lightning.generation.decoding.stopping import StopCondition, StopReason

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORWARD_ARGUMENTS = {"input_ids", "attention_mask", "position_ids", "use_cache"}
# Their angles depend on the length of the longest row, so the keys of a prefix would change later.
_LENGTH_DEPENDENT_ROTATIONS = {"dynamic", "longrope"}

# Padded tokens of one prefill pass: enough to use the device, few enough for similar lengths and little memory.
_PART_TOKENS = 2048


@dataclass
class Answer:
    """Tokens of an answer, why it ended, and the mean entropy of the distributions of its tokens, in nats."""

    tokens: list[int] = field(default_factory=list)
    stop_reason: StopReason = "length"
    mean_entropy: float | None = None


def decoding_obstacle(model: "PreTrainedModel") -> str | None:
    """Returns why the loop cannot run a model, or None if it can: its only state is keys and values of all tokens.

    Models with sliding windows, recurrent states, or their own inputs or attention use ``generate`` of transformers.
    """
    arguments = inspect.signature(model.forward).parameters.keys()
    missing = sorted(_FORWARD_ARGUMENTS - arguments)
    cache_argument = _cache_argument(model)
    if missing or cache_argument is None:
        return f"its forward takes no {', '.join(missing) or 'cache'}"
    prepares_inputs = getattr(type(model), "prepare_inputs_for_generation", None)
    if prepares_inputs is not GenerationMixin.prepare_inputs_for_generation:
        return "it prepares its inputs itself"
    # Attention outside of the interface of transformers may count slots instead of using the mask.
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention is not behind transformers' interface"
    config = model.config.get_text_config(decoder=True)
    if _rotations(config) & _LENGTH_DEPENDENT_ROTATIONS:
        return "its rotary angles depend on the longest row"
    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return "its state is not the keys and values of all tokens"
    cache = KVCache(len(layers))
    token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    inputs = {"input_ids": token, "attention_mask": token + 1, "position_ids": token, cache_argument: cache}
    with torch.no_grad():
        model(**inputs, use_cache=True)
    if any(layer.get_seq_length() != 1 for layer in cache.row_layers):
        return "it does not fill the cache that it is given"
    return None


def _cache_argument(model: "PreTrainedModel") -> str | None:
    """Returns the name under which a model's forward takes its cache."""
    arguments = inspect.signature(model.forward).parameters
    # transformers 5.24 renamed it in its own models. A model of the user's may keep the old name.
    return next((name for name in ("cache", "past_key_values") if name in arguments), None)


def _rotations(config: Any) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    of_layer_types = [value for value in parameters.values() if isinstance(value, dict)]
    return {each.get("rope_type", "default") for each in (of_layer_types or [parameters])}


class DecodingLoop:
    """Answers batches of prompts.

    Args:
        model: One without a ``decoding_obstacle``, in evaluation mode.
        prompts: Token ids of all prompts that will be answered. Their common prefix is computed here.
        sampler: Chooses the next tokens.
        stop_condition: Decides when answers end.
        pad_token_id: Token id of padding.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        prompts: Sequence[list[int]],
        sampler: TokenSampler,
        stop_condition: StopCondition,
        pad_token_id: int,
    ) -> None:
        self._model = model
        self._sampler = sampler
        self._stop_condition = stop_condition
        self._pad_token_id = pad_token_id
        self._num_layers = len(DynamicCache(config=model.config.get_text_config(decoder=True)).layers)
        cache_argument = _cache_argument(model)
        assert cache_argument is not None
        self._cache_argument = cache_argument
        # Otherwise a prompt would get logits at all positions.
        takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if takes_logits_to_keep else {}
        self._prefix: KVCache | None = None
        self._num_prefix = _num_common(prompts)
        if self._num_prefix:
            self._prefix = KVCache(self._num_layers)
            ids = torch.tensor([prompts[0][: self._num_prefix]], device=model.device)
            places = torch.arange(self._num_prefix, device=model.device)[None]
            self._forward(ids, torch.ones_like(ids), places, self._prefix)

    @torch.no_grad()
    def answer(self, prompts: Sequence[list[int]], numbers: Sequence[int]) -> list[Answer]:
        """Returns an answer to each prompt.

        Args:
            prompts: Token ids, from the prompts of the constructor.
            numbers: Which answer of the evaluation each one is: the random numbers depend on it.
        """
        device, max_new_tokens = self._model.device, self._stop_condition.max_new_tokens
        answers = [Answer() for _ in prompts]
        # The answer of each row of the batch.
        rows = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), prompts[index]))
        cache, logits, mask, positions = self._prefill([tuple(prompts[row]) for row in rows])
        num_tokens = cache.get_seq_length()
        random_numbers = self._sampler.random_numbers([numbers[row] for row in rows], max_new_tokens, device)
        entropies = torch.zeros(len(rows), device=device)
        for step in range(max_new_tokens):
            tokens, entropy = self._sampler(logits, random_numbers[:, step])
            entropies += entropy
            ended = self._take(tokens.tolist(), [answers[row] for row in rows])
            if ended:
                sums = entropies.tolist()
                for place in ended:
                    answers[rows[place]].mean_entropy = sums[place] / (step + 1)
                if len(ended) == len(rows):
                    return answers
                kept = _close_gaps(cache, len(rows), ended, device)
                rows = [rows[place] for place in kept]
                index = torch.tensor(kept, device=device)
                tensors = (tokens, mask, positions, random_numbers, entropies)
                tokens, mask, positions, random_numbers, entropies = (each.index_select(0, index) for each in tensors)
            mask[:, num_tokens + step] = 1
            logits = self._forward(tokens[:, None], mask[:, : cache.num_slots(1)], positions[:, None], cache)
            positions += 1
        raise AssertionError("an answer continued after its last token")

    def _take(self, tokens: list[int], answers: list[Answer]) -> list[int]:
        """Appends a token to each answer. Returns the indices of the answers that ended."""
        ended = []
        for place, (token, answer) in enumerate(zip(tokens, answers, strict=True)):
            answer.tokens.append(token)
            reason = self._stop_condition.reason(answer.tokens)
            if reason is not None:
                answer.stop_reason = reason
                ended.append(place)
        return ended

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> tuple[KVCache, Tensor, Tensor, Tensor]:
        """Runs the prompts, longest first; equal prompts run once.

        Returns:
            The cache; the logits of the first new tokens, shape [B, V]; which slots of the cache hold a token, shape
            [B, S], int64, including all later slots; and the positions of the first new tokens, shape [B], int64.
        """
        device, num_prefix = self._model.device, self._num_prefix
        distinct = list(dict.fromkeys(prompt[num_prefix:] for prompt in prompts))
        num_slots = num_prefix + len(distinct[0])
        mask = torch.zeros(
            (len(distinct), num_slots + self._stop_condition.max_new_tokens + SPARE_SLOTS), dtype=torch.int64
        )
        mask[:, :num_prefix] = 1
        parts, logits = [], []
        for start, end in _parts(distinct):
            input_ids, is_token = _left_padded(distinct[start:end], self._pad_token_id)
            seen = torch.cat([mask[start:end, :num_prefix], is_token], dim=1)
            positions = seen.cumsum(-1)[:, num_prefix:] - 1
            parts.append(KVCache(self._num_layers, self._prefix))
            logits.append(self._forward(input_ids.to(device), seen.to(device), positions.to(device), parts[-1]))
            mask[start:end, num_slots - is_token.shape[1] : num_slots] = is_token
        cache = KVCache.of_parts(parts, num_prefix)
        next_positions = mask.sum(-1)
        rows = torch.arange(len(prompts))
        if len(distinct) < len(prompts):
            place_of = {rest: place for place, rest in enumerate(distinct)}
            rows = torch.tensor([place_of[prompt[num_prefix:]] for prompt in prompts])
            cache.repeat_rows(rows.to(device))
        return cache, torch.cat(logits)[rows.to(device)], mask[rows].to(device), next_positions[rows].to(device)

    @torch.no_grad()
    def _forward(self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Returns the logits after the last tokens. Shape [B, V]."""
        output = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self._cache_argument: cache},
            **self._options,
        )
        return output.logits[:, -1]


def _num_common(prompts: Sequence[list[int]]) -> int:
    """Returns the length of the common prefix of all prompts, at most one less than the shortest."""
    first, last = min(prompts), max(prompts)  # in lexicographic order, these two differ first
    most = min(map(len, prompts)) - 1
    return next((index for index in range(most) if first[index] != last[index]), most)


def _parts(rests: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """Yields start and end of the prefill passes over prompts in order of decreasing length."""
    start = 0
    while start < len(rests):
        end = min(len(rests), start + max(1, _PART_TOKENS // len(rests[start])))
        yield start, end
        start = end


def _left_padded(rows: Sequence[tuple[int, ...]], padding: int) -> tuple[Tensor, Tensor]:
    """Returns token ids and 1 where they are not padding, both of shape [B, T], int64. The first row is the longest."""
    width = len(rows[0])
    input_ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return input_ids, (torch.arange(width) >= width - lengths[:, None]).long()


def _close_gaps(cache: KVCache, num_rows: int, ended: list[int], device: torch.device) -> list[int]:
    """Moves the last rows of the cache into the places of finished ones. Returns the old index of each new row."""
    num_kept = num_rows - len(ended)
    gone = set(ended)
    gaps = [place for place in ended if place < num_kept]
    movers = [place for place in range(num_kept, num_rows) if place not in gone]
    if gaps:
        cache.move_rows(torch.tensor(movers, device=device), torch.tensor(gaps, device=device))
    kept = list(range(num_kept))
    for gap, mover in zip(gaps, movers, strict=True):
        kept[gap] = mover
    return kept
