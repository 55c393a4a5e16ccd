"""Texts to tokens."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxcl.typing import bad_argument, check_at_least


def tokenize(texts: Sequence[str], tokenizer: str | Path, *, length: int = 128) -> np.ndarray:
    """Tokens [N, length] int32 of N texts, cut to `length`, special tokens included, and filled up with 0.

    Args:
        texts: in the order of the rows.
        tokenizer: tokenizer.json as Hugging Face has it; MiniLM's is in `nets.minilm_folder()`. Its own rules of
            cutting and filling up are not followed.
        length: tokens of a text at most.

    Raises:
        ImportError: the tokenizers package is missing.
        ValueError: a length below 1, or a file that is missing or damaged.
    """
    check_at_least("length", length, 1)
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('texts need tokenizers: pip install "jaxcl[text]"') from error
    try:
        model = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # tokenizers raises nothing narrower
        raise bad_argument(
            "tokenizer", f"{tokenizer}: {error}", "the file is missing or no tokenizer.json: copy it again"
        ) from error
    model.no_padding()
    model.enable_truncation(length)
    tokens = np.zeros((len(texts), length), np.int32)
    for row, encoding in zip(tokens, model.encode_batch(list(texts)), strict=True):
        row[: len(encoding.ids)] = encoding.ids
    return tokens
