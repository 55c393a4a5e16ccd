"""Sequences of tasks in one space of labels: texts as tokens or as what a frozen part of a network makes of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxcl import data, nets
from jaxcl.continual import Examples, Stream, streams
from jaxcl.data.packs import Texts
from jaxcl.nets import BERT, FrozenEncoder
from jaxcl.typing import Array, ArrayLike, PyTree, bad_argument, check_at_least

# Tasks of the pack in the orders in which they come.
ORDERS = {
    "short": (
        ("dbpedia", "amazon", "yelp", "agnews"),
        ("yelp", "agnews", "amazon", "dbpedia"),
        ("agnews", "dbpedia", "yelp", "amazon"),
    ),
    "long": (("multirc", "yelp", "cb", "copa", "qqp", "rte", "amazon", "sst2", "dbpedia", "agnews"),),
}  # fmt: skip
_LOWER_BATCH = 32


class TextTask(NamedTuple):
    """A task of texts, labels in a space that all tasks share."""

    name: str
    train: Texts
    test: Texts


def load_tasks(
    source: str, *, train: int, test: int, validation: bool, test_split: str = "test"
) -> tuple[list[TextTask], tuple[tuple[int, ...], ...]]:
    """Tasks, and the orders in which they are to come.

    Labels of one name are one label, whatever the task.

    Args:
        source: short or long, of the pack in the folder that JAXCL_DATA names; or json:PATH, whose folders are tasks
            in the benchmark's layout and come in the order of their names; or tfds:NAME,NAME, data sets that TFDS has
            prepared, in the order given.
        train: texts to learn from, at most, drawn from each task's.
        test: texts to be tested on, at most, likewise.
        test_split: of tfds, where they come from.
        validation: test on training texts that are not learnt from, instead.

    Raises:
        ValueError: another source, or one without tasks; as `data.cl_text`, `data.text_task` and
            `data.text_task_from_tfds`.
    """
    check_at_least("train_texts", train, 1)
    check_at_least("test_texts", test, 1)
    kind, _, place = source.partition(":")
    if kind == "json":
        folders = sorted(path.parent for path in Path(place).rglob("labels.json"))
        if not folders:
            raise bad_argument("data", source, "name a folder whose folders are tasks, each with a labels.json")
        found = {folder.relative_to(place).as_posix(): data.text_task(folder) for folder in folders}
        orders: tuple[tuple[int, ...], ...] = (tuple(range(len(found))),)
    elif kind == "tfds":
        sets = place.split(",")
        if len(set(sets)) < len(sets):
            raise bad_argument("data", source, "name each data set once")
        found = {name: data.text_task_from_tfds(name, test=test_split) for name in sets}
        orders = (tuple(range(len(found))),)
    else:
        found = {name: data.cl_text(name) for name in ORDERS[kind][0]}
        orders = tuple(tuple(list(found).index(name) for name in order) for order in ORDERS[kind])
    names = list(dict.fromkeys(name for parts in found.values() for name in parts[0].label_names))
    tasks = []
    for task, (learnt, tested) in found.items():
        rows = np.random.default_rng(0).permutation(len(learnt.texts))
        if validation:  # at least a fifth is left
            own = min(train, 4 * len(rows) // 5)
            held_out = _renamed(learnt, rows[own : own + test], names)
        else:
            own, chosen = train, np.random.default_rng(1).permutation(len(tested.texts))[:test]
            held_out = _renamed(tested, chosen, names)
        tasks.append(TextTask(task, _renamed(learnt, rows[:own], names), held_out))
    return tasks, orders


def _renamed(texts: Texts, rows: np.ndarray, names: list[str]) -> Texts:
    """Some of the texts, with labels that are places among `names`."""
    place = np.array([names.index(name) for name in texts.label_names], np.int32)
    return Texts([texts.texts[row] for row in rows], place[texts.labels[rows]], names)


def lower_layers(network: BERT, params: PyTree, layers: int) -> FrozenEncoder:
    """The first layers of a BERT: tokens [B, T] int32, 0 where there is none, to vectors [B, T, D] float16.

    Vectors where there is no token are 0, and no others are.
    """
    below = network.clone(layers=layers)

    @jax.jit
    def apply(params: PyTree, tokens: ArrayLike) -> Array:
        mask = jnp.asarray(tokens) != 0
        return jnp.where(mask[..., None], jnp.asarray(below.apply(params, tokens, mask)), 0).astype(jnp.float16)

    name = f"bert ({network.heads} heads, {network.activation}, {network.epsilon}), layers before {layers}, float16"
    return FrozenEncoder(name, params, apply, _LOWER_BATCH)


def text_streams(
    tasks: Sequence[TextTask], orders: Sequence[Sequence[int]], encoder: FrozenEncoder, *, length: int, folder: Path
) -> list[Stream]:
    """One stream an order, of what the encoder makes of each text's tokens [length]; all share the examples.

    Training steps choose among the classes of their own task alone.
    """
    tokenizer = nets.minilm_folder() / "tokenizer.json"

    def examples(texts: Texts, name: str) -> Examples:
        tokens = data.tokenize(texts.texts, tokenizer, length=length)
        with tqdm(desc=f"frozen layers, {name}", total=len(tokens), unit="text", dynamic_ncols=True) as bar:
            made = data.compute_features(encoder, tokens, folder=folder, callback=lambda done: bar.update(done - bar.n))
        return Examples(np.asarray(made), texts.labels)

    return _in_orders(
        [(examples(t.train, t.name), examples(t.test, f"{t.name}, test")) for t in tasks],
        orders,
        len(tasks[0].train.label_names),
    )


def token_streams(
    tasks: Sequence[TextTask], orders: Sequence[Sequence[int]], tokenizer: Path, *, length: int, classes: int
) -> list[Stream]:
    """One stream an order, of each text's tokens [length], `nets.NO_TOKEN` after them; all share the examples."""

    def examples(texts: Texts) -> Examples:
        return Examples(data.tokenize(texts.texts, tokenizer, length=length, fill=nets.NO_TOKEN), texts.labels)

    return _in_orders([(examples(task.train), examples(task.test)) for task in tasks], orders, classes)


def _in_orders(
    parts: Sequence[tuple[Examples, Examples]], orders: Sequence[Sequence[int]], classes: int
) -> list[Stream]:
    whole = streams.trained_apart(streams.data_sets(parts, classes=classes))
    return [streams.reordered(whole, order) for order in orders]
