"""Tokenize text for training, evaluation and generation.

Prompt and response are tokenized separately and joined, as in generation. Special tokens:

- A prompt begins with one BOS if the tokenizer adds one by default.
- A response ends with one EOS if ``append_eos`` is set.
- Text that spells a special token becomes that token, as in transformers, so prompts rendered with a chat template
  work. A prompt that begins with BOS, or a response that ends with EOS, gets no second one.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sft_lightning.data.batch import Example
from sft_lightning.data.formats.base import Record
from sft_lightning.data.load_report import LoadReport
from sft_lightning.data.settings import DataSettings
from sft_lightning.errors import UserError
from sft_lightning.system.files import user_path
from sft_lightning.system.remote_code import without_remote_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RECORDS_AT_ONCE = 1024


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer of a local folder, without network access, or of a model on the hub.

    Raises:
        UserError: If the path does not hold a tokenizer, or the tokenizer has no vocabulary.
    """
    from transformers import AutoTokenizer  # takes seconds to import

    path = user_path(path)
    if Path(path).is_file():
        raise UserError(f"tokenizer path '{path}' is a file; give the folder that holds it")
    local = Path(path).is_dir()
    try:
        tokenizer = without_remote_code(AutoTokenizer.from_pretrained, path, local_files_only=local)
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        place = "in the folder" if local else "under that name: it is not a local folder and the hub did not provide it"
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no tokenizer '{path}' {place} ({type(error).__name__}: {reason})") from None
    # For a folder with only a model's config.json, transformers returns an empty tokenizer.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"tokenizer path '{path}' holds no vocabulary; give a folder with tokenizer files")
    return tokenizer


def wants_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Returns whether the tokenizer begins a text with BOS by default."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]


def pad_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Returns the id of padding: PAD, else EOS, else 0. Masks are built from positions, so any id works."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def encode_prompts(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of each prompt, with one BOS in front if the tokenizer adds one by default."""
    rows = _encode(tokenizer, prompts)
    if not wants_bos(tokenizer):
        return rows
    bos = tokenizer.bos_token_id
    return [row if row[:1] == [bos] else [bos, *row] for row in rows]


def encode_responses(
    tokenizer: "PreTrainedTokenizerBase", responses: Sequence[str], *, append_eos: bool
) -> list[list[int]]:
    """Returns the token ids of each response, with one EOS at the end if ``append_eos`` is set.

    Raises:
        UserError: If ``append_eos`` is set and the tokenizer has no EOS.
    """
    rows = _encode(tokenizer, responses)
    if not append_eos:
        return rows
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no EOS token for data.append_eos; add one to its files, or set it to false")
    return [row if row[-1:] == [eos] else [*row, eos] for row in rows]


def tokenize_records(
    records: Iterator[Record],
    tokenizer: "PreTrainedTokenizerBase",
    settings: DataSettings,
    load_report: LoadReport,
) -> Iterator[tuple[Record, Example]]:
    """Yields records of at most ``max_length`` tokens with their tokens. Tokens of the response are labels.

    Args:
        records: The records, read in chunks so that memory stays flat.
        tokenizer: The tokenizer.
        settings: Provides ``max_length``, ``overlength`` and ``append_eos``.
        load_report: Collects skipped and truncated rows.

    Raises:
        UserError: At the end, if ``overlength`` is ``error`` and some rows are longer.
    """
    max_length = settings.max_length
    for chunk, prompts, responses in _encoded_chunks(records, tokenizer, append_eos=settings.append_eos):
        for record, prompt, response in zip(chunk, prompts, responses, strict=True):
            if not prompt or not response:
                name = "response" if prompt else "prompt"
                load_report.bad_rows.add(record.source, f"the {name} has no tokens")
                continue
            kept = prompt
            if settings.overlength == "truncate_prompt":
                kept = truncate_prompt(tokenizer, prompt, max_length - len(response))
            if len(kept) + len(response) > max_length:
                load_report.overlength_rows.add(record.source, f"{len(prompt) + len(response)} tokens")
                continue
            load_report.truncated_prompts += len(kept) < len(prompt)
            tokens = np.fromiter(itertools.chain(kept, response), np.int32, len(kept) + len(response))
            yield record, Example.from_prompt(tokens, len(kept), record.source)
    if settings.overlength == "error" and load_report.overlength_rows.count:
        raise UserError(
            f"rows over data.max_length {max_length} ({load_report.overlength_rows.count}): "
            f"{load_report.overlength_rows}. Raise it, or set data.overlength to drop or truncate_prompt"
        )


def _encoded_chunks(
    records: Iterator[Record], tokenizer: "PreTrainedTokenizerBase", *, append_eos: bool
) -> Iterator[tuple[list[Record], list[list[int]], list[list[int]]]]:
    """Yields chunks of records with their prompt ids and response ids.

    A fast tokenizer uses all cores and releases the GIL. A thread encodes one chunk while this thread reads the next
    one and the caller stores the previous one.
    """

    def encode(chunk: list[Record]) -> tuple[list[Record], list[list[int]], list[list[int]]]:
        # Responses to the same prompt are often in neighboring rows.
        distinct = list(dict.fromkeys(record.prompt for record in chunk))
        prompt_ids = dict(zip(distinct, encode_prompts(tokenizer, distinct), strict=True))
        responses = encode_responses(tokenizer, [record.response for record in chunk], append_eos=append_eos)
        return chunk, [prompt_ids[record.prompt] for record in chunk], responses

    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = None
        while chunk := list(itertools.islice(records, _RECORDS_AT_ONCE)):
            previous, ahead = ahead, thread.submit(encode, chunk)
            if previous:
                yield previous.result()
        if ahead:
            yield ahead.result()


def truncate_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: list[int], num_tokens: int) -> list[int]:
    """Returns a prompt truncated from the left to ``num_tokens`` tokens, including its BOS if it has one.

    Always keeps one token besides BOS, so the result can be longer than ``num_tokens``.
    """
    num_front = int(prompt[:1] == [tokenizer.bos_token_id])
    num_cut = min(len(prompt) - num_tokens, len(prompt) - num_front - 1)
    return prompt[:num_front] + prompt[num_front + max(num_cut, 0) :]


def tokenize_prompt_and_output(
    prompt_strs: Sequence[str], output_strs: Sequence[str], tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Tensor]:
    """Returns prompts and outputs as right-padded tensors, shifted so that position t predicts label t.

    Adds no EOS. T is the length of the longest row minus one: inputs lack the last token, labels the first.

    Returns:
        ``input_ids``: Shape [B, T], int64.
        ``labels``: Shape [B, T], int64, ``input_ids`` shifted left by one.
        ``response_mask``: Shape [B, T], bool, True where the label is a token of the output.

    Raises:
        UserError: If the two lists are empty or differ in length.
    """
    if not prompt_strs or len(prompt_strs) != len(output_strs):
        raise UserError(
            f"got {len(prompt_strs)} prompt_strs and {len(output_strs)} output_strs; give pairs, at least one"
        )
    prompts = encode_prompts(tokenizer, prompt_strs)
    outputs = encode_responses(tokenizer, output_strs, append_eos=False)
    rows = [torch.tensor(prompt + output, dtype=torch.int64) for prompt, output in zip(prompts, outputs, strict=True)]
    full = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id(tokenizer))
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    ends = torch.tensor([len(row) for row in rows])[:, None]
    label_positions = torch.arange(1, full.shape[1])
    return {
        "input_ids": full[:, :-1].contiguous(),
        "labels": full[:, 1:].contiguous(),
        "response_mask": (label_positions >= starts) & (label_positions < ends),
    }


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns the SHA-256, in hex, of everything that determines the token ids of a text."""
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer.to_str()
        # The text before it describes the padding and truncation of the last call, which do not apply here.
        backend = backend[backend.index('"added_tokens"') :]
    else:
        backend = type(tokenizer).__qualname__ + json.dumps(sorted(tokenizer.get_vocab().items()))
    ends = [wants_bos(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.split_special_tokens]
    return hashlib.sha256((json.dumps(ends) + backend).encode()).hexdigest()


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    if tokenizer.is_fast:
        # Gives the same ids as below in three quarters of the time, since it keeps no token offsets.
        backend = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about length: data.overlength handles that
    )["input_ids"]
