"""A tiny model and its tokenizer, made on the spot: random weights, nothing downloaded."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
CONTEXT_LENGTH = 2048


def write_tiny_model(output_dir: str | Path, texts: Iterable[str], *, seed: int = 0) -> None:
    """Writes a Qwen2 model of 0.8 million random weights and a tokenizer trained on ``texts``, as a model folder.

    ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it. Equal arguments give equal weights and tokens, and the
    global random state is left alone.

    Args:
        output_dir: Folder for config.json, model.safetensors, generation_config.json and the tokenizer's files.
        texts: Text like that which the model is going to see.
        seed: Seed of the weights.
    """
    tokenizer = train_tokenizer(texts)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int = 1024) -> Qwen2Tokenizer:
    """Returns a byte-level BPE tokenizer that keeps every digit apart and knows no text that it cannot encode.

    Args:
        texts: What to learn merges from.
        vocabulary_size: At most this many tokens, the 256 bytes and two special tokens included.
    """
    # transformers loads whatever tokenizer lies in a Qwen2 folder with Qwen2's own normalizer (NFC) and pre-tokenizer:
    # one that was trained with any other would come back different.
    trained = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size=vocabulary_size, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    trained.pad_token = PADDING
    return trained
