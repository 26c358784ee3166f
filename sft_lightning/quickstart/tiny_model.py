"""Create a tiny model with random weights and train its tokenizer, without downloads."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AddedToken, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from sft_lightning.system.files import atomic_folder, sync

PADDING = "<|pad|>"
CONTEXT_LENGTH = 2048


def write_tiny_model(
    output_dir: str | Path, texts: Iterable[str], *, fixed_texts: Iterable[str] = (), seed: int = 0
) -> None:
    """Writes a folder with a Qwen2 model of half a million random weights and a tokenizer trained on ``texts``.

    ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it. Equal arguments give equal files. The global random state
    does not change.

    Args:
        output_dir: Folder to write into. A new one appears with all of its files; in one that is there, files with the
            same names are replaced, each as a whole.
        texts: Texts like those that the model will see.
        fixed_texts: Long texts that every prompt contains. Each becomes one token, so that a short run does not spend
            most of its time on them.
        seed: Seed of the weights.
    """
    tokenizer = train_tokenizer(texts, fixed_texts=fixed_texts)
    special_ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,  # 0.02, the default, is meant for wider layers and learns more slowly
        bos_token_id=None,
        dtype=torch.float32,
        **special_ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(**special_ids)

    def replace_files() -> bool:
        for file in sorted(folder.iterdir()):
            file.replace(Path(output_dir) / file.name)
        return False

    with atomic_folder(Path(output_dir), replace_files) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            sync(file)


def train_tokenizer(texts: Iterable[str], *, fixed_texts: Iterable[str] = ()) -> Qwen2Tokenizer:
    """Returns a byte-level BPE tokenizer with one token per digit, which encodes any text.

    Decoding returns the text in Unicode's composed form (NFC): every Qwen2 tokenizer normalizes its input to it.

    Args:
        texts: Texts to learn merges from.
        fixed_texts: Texts that become one token each.
    """
    # AutoTokenizer loads the tokenizer of any Qwen2 folder with Qwen2's normalizer and pre-tokenizer. A tokenizer
    # trained with others would change when it is loaded.
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size=1024, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in fixed_texts])
    tokenizer.add_special_tokens({"pad_token": PADDING})
    tokenizer.model_max_length = CONTEXT_LENGTH
    return tokenizer
