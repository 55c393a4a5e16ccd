"""Texts of a task from JSON files, and texts to tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.data.packs import Texts
from jaxcl.typing import bad_argument, check_at_least, check_count


def text_task(folder: str | Path) -> tuple[Texts, Texts]:
    """One task in the layout of the text benchmark of O-LoRA (arXiv 2310.14152), (train, test); labels are [N].

    The folder holds train.json and test.json, lists of {"sentence": text, "label": name}, and labels.json, the list of
    names, in whose order labels are numbered.

    Raises:
        ValueError: a file is damaged, empty or of another layout, or has a label that is not in labels.json.
        OSError: a file cannot be read, or is not there.
    """
    names_path = Path(folder) / "labels.json"
    names = _json(names_path)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise _not_laid_out(names_path, "no list of names")
    if len(set(names)) < len(names):
        raise _not_laid_out(names_path, "a name twice")

    def read(name: str) -> Texts:
        path = Path(folder) / name
        rows = _json(path)
        try:
            texts = [row["sentence"] for row in rows]
            labels = np.array([names.index(row["label"]) for row in rows], np.int32)
        except (TypeError, KeyError, ValueError) as error:  # the last where a label is no name
            raise _not_laid_out(path, repr(error)) from error
        if not texts or not all(isinstance(text, str) for text in texts):
            raise _not_laid_out(path, "no texts" if not texts else "a sentence that is no text")
        return Texts(texts, labels, names)

    return read("train.json"), read("test.json")


def tokenize(
    texts: Sequence[str], tokenizer: str | Path, *, length: int = 128, special: bool = True, fill: int = 0
) -> np.ndarray:
    """Tokens [N, length] int32 of N texts, cut to `length`, special tokens counted, and filled up.

    Args:
        texts: in the order of the rows.
        tokenizer: tokenizer.json as Hugging Face has it; MiniLM's is in `nets.minilm_folder()`. Its own rules of
            cutting and filling up are not followed.
        length: tokens of a text at most.
        special: whether the tokenizer adds the tokens with which its network's texts begin or end.
        fill: stands where there is no token; `nets.NO_TOKEN` for answers in words.

    Raises:
        ImportError: the tokenizers package is missing.
        ValueError: a length below 1, or below the special tokens' number; a file that is missing or damaged.
    """
    check_count("length", length, 1)
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
    if special:
        check_at_least("length", length, model.num_special_tokens_to_add(is_pair=False))
    model.no_padding()
    model.enable_truncation(length)
    tokens = np.full((len(texts), length), fill, np.int32)
    for row, encoding in zip(tokens, model.encode_batch(list(texts), add_special_tokens=special), strict=True):
        row[: len(encoding.ids)] = encoding.ids
    return tokens


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _not_laid_out(path, str(error)) from error


def _not_laid_out(path: Path, fault: str) -> ValueError:
    return bad_argument(
        "folder", f"{path}: {fault}", 'train.json and test.json list {"sentence", "label"}, labels.json the labels'
    )
