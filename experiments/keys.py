"""The key-value bottleneck in two stages, as several experiments train it: keys are fitted, then only values learn."""

import io
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import FeatureStage, Run
from jaxcl import bottleneck, continual, files, nets, report, trees
from jaxcl.bottleneck import Bottleneck, KeyState
from jaxcl.continual import Examples, Result, Stream, streams
from jaxcl.continual.compilations import count_compilations
from jaxcl.typing import Array, ArrayLike, Key, PyTree, bad_argument

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tqdm import tqdm

_MOST_EPOCHS_A_CALL = 10  # of training in the dual


class KeyFitting(NamedTuple):
    """How keys come to lie where features do."""

    epochs: int  # passes over the source, or, for keys of SimVQ, iterations
    batch_size: int  # examples in a step
    share: float | None = None  # of the source's variance that a learned projection keeps; None draws one at random
    simvq: bool = False  # keys are an affine image of codes drawn once, and not moving averages


class Indexed(NamedTuple):
    """A seed's bottleneck with its keys, and the stream as what they fetch."""

    params: PyTree
    state: KeyState
    stream: Stream  # of indices [N, C, top_k] uint16
    stage: FeatureStage


def train_bottleneck(
    run: Run,
    layer: Bottleneck,
    learning_rate: float,
    tasks: Sequence[Stream],
    init_keys: Sequence[Key],
    keys: Key,
    *,
    name: str = "dkvb",
    classes: int,
    fitting: KeyFitting,
    source: ArrayLike | None = None,
    decoder: nets.MLP | None = None,
    train_decoder: bool = False,
    dual: bool = False,
    epochs: int,
    batch_size: int,
    steps_per_call: int | None = None,
) -> list[Indexed]:
    """Fits the keys without labels, then trains the values of each seed; returns what was trained on.

    Args:
        run: keeps the results.
        layer: the bottleneck.
        learning_rate: of gradient descent on the values; the global norm is clipped to 1.
        tasks: one stream a seed, of features [N, D] or feature maps [N, P, D].
        init_keys: one a seed; consumed.
        keys: [S], one a seed, for training; consumed.
        name: under which results and checkpoints are kept.
        classes: K, which values may be wider than.
        fitting: of the keys.
        source: unlabelled features [N, D] that keys are fitted to; None takes those of the first seed's stream.
        decoder: a network of the values, drawn for each seed; None lets them vote.
        train_decoder: whether it learns with the values.
        dual: whether values are trained by `bottleneck.train_votes`.
        epochs: passes over each task.
        batch_size: examples in a step.
        steps_per_call: as in `continual.run`.

    Raises:
        ValueError: a decoder in the dual.
    """
    if dual and decoder:
        raise bad_argument("dual", dual, "a decoder is trained without it: leave one of the two out")
    shown = jnp.asarray(tasks[0].train.inputs if source is None else source)
    fitting_keys, decoder_keys = zip(*map(jax.random.split, init_keys), strict=True)
    indexed = _fit_and_look_up(run, name, layer, fitting, shown.reshape(-1, shown.shape[-1]), tasks, fitting_keys)
    params, stages = [seed.params for seed in indexed], [seed.stage for seed in indexed]
    if decoder:
        params = [
            _with_decoder(key, decoder, layer, values, seed.stream)
            for key, values, seed in zip(decoder_keys, params, indexed, strict=True)
        ]
    looked_up = [seed.stream for seed in indexed]
    if dual:
        steps: dict[str, Any] = {
            "classes": classes, "learning_rate": learning_rate, "epochs": epochs, "batch_size": batch_size,
        }  # fmt: skip
        run.keep(name, [
            _train_in_dual(run, name, layer, start, stream, key, seed, **steps)
            for seed, (start, stream, key) in enumerate(zip(params, looked_up, keys, strict=True))
        ], stages)  # fmt: skip
        return indexed
    tx = bottleneck.sparse_sgd(learning_rate, max_norm=1.0)
    strategy = continual.key_value_bottleneck(
        layer, classes=classes, decoder=decoder.apply if decoder else None, train_decoder=train_decoder
    )
    run.train(
        name, strategy, tx, params, looked_up, keys, epochs=epochs, batch_size=batch_size,
        steps_per_call=steps_per_call, stages=stages,
    )  # fmt: skip
    return indexed


def key_figures(layer: Bottleneck, indexed: Indexed, stream: Stream, *, examples: int = 1000) -> "dict[str, Figure]":
    """Figures of one seed's keys by caption; `stream` is what was indexed, of which some `examples` are drawn.

    They are of what was looked up: in training for the use of keys, in training and test for distances.
    """
    fetched, labels = np.asarray(indexed.stream.train.inputs), np.asarray(stream.train.labels)
    codebooks, pairs = indexed.state.usage.shape
    flat = fetched.reshape(-1, codebooks, fetched.shape[-1])
    usage = np.stack([np.bincount(flat[:, codebook].reshape(-1), minlength=pairs) for codebook in range(codebooks)])
    classes = stream.eligible.shape[1]
    by_class = np.stack(
        [np.bincount(fetched[labels == k][..., 0, :].reshape(-1), minlength=pairs) for k in range(classes)]
    )
    distances, features, shown = {}, jnp.empty(0), np.empty(0)
    for name, part, indices in (
        ("training examples", stream.train, indexed.stream.train.inputs),
        ("test examples", stream.test, indexed.stream.test.inputs),
    ):
        rows = np.linspace(0, len(part.labels) - 1, min(examples, len(part.labels))).astype(int)
        features, shown = jnp.asarray(part.inputs[rows]), np.asarray(part.labels)[rows]
        distances[name] = np.asarray(layer.distances(indexed.state, features, jnp.asarray(indices[rows])))
    keys = np.asarray(indexed.state.keys.codebook[0])
    heads = np.asarray(layer.heads(indexed.state, features)[0]).reshape(len(shown), -1, keys.shape[1])[:, 0]
    return {
        "How many of its keys each codebook uses (first seed, training examples)": report.key_utilisation(usage),
        "Which keys of the first codebook which classes use": report.keys_by_class(by_class),
        "Keys of the first codebook among heads of test examples": report.keys_among_heads(heads, shown, keys),
        "How far heads are from the keys they fetch": report.distance_histograms(distances),
    }


def fit_keys(
    run: Run, name: str, layer: Bottleneck, fitting: KeyFitting, source: Array, key: Key, seed: int, bar: "tqdm[Any]"
) -> tuple[PyTree, KeyState, float]:
    """Values and keys of one seed, and the seconds that it took; saved on the way, so that a stopped run goes on.

    Args:
        run: whose method `name` it is.
        name: of the method.
        layer: the bottleneck.
        fitting: how.
        source: unlabelled features [N, D].
        key: consumed.
        seed: its number.
        bar: told of each pass.
    """
    began, path = time.perf_counter(), run.checkpoints(name) / f"keys_{seed}.npz"
    init_key, projection_key, *epoch_keys = jax.random.split(key, 2 + fitting.epochs)
    values, state = layer.init(init_key)
    if fitting.share is not None:
        state = bottleneck.learn_projection(projection_key, state, source, share=fitting.share)
    done, before = 0, 0.0
    if saved := load_tree(path, (state, {"done": np.zeros(2)})):
        state, done, before = saved[0], int(saved[1]["done"][0]), float(saved[1]["done"][1])
    bar.update(done)
    written = time.perf_counter()
    if fitting.simvq and not done:
        state = bottleneck.fit_simvq_keys(epoch_keys[0], layer, state, source, iterations=fitting.epochs)
        jax.block_until_ready(state)
        bar.update(fitting.epochs)
        done = fitting.epochs
    for number in range(done, fitting.epochs):
        state = bottleneck.fit_epoch(epoch_keys[number], layer, values, state, source, batch_size=fitting.batch_size)
        jax.block_until_ready(state)
        bar.update()
        if run.due(written) or (number + 1 == fitting.epochs and run.due(began)):
            written = time.perf_counter()
            save_tree(path, (state, {"done": np.array([number + 1, before + written - began])}))
    return values, state, before + time.perf_counter() - began


def _fit_and_look_up(
    run: Run,
    name: str,
    layer: Bottleneck,
    fitting: KeyFitting,
    source: Array,
    tasks: Sequence[Stream],
    keys: Sequence[Key],
) -> list[Indexed]:
    lookup = jax.jit(layer.lookup)
    indexed = []
    with run.bar(f"{name} keys", len(tasks) * (fitting.epochs + 1), "epoch") as bar:
        for seed, (key, stream) in enumerate(zip(keys, tasks, strict=True)):
            values, state, seconds = fit_keys(run, name, layer, fitting, source, key, seed, bar)
            # Keys never move again, so what each example fetches is known for good: train on that.
            began = time.perf_counter()
            looked_up = streams.map_inputs(stream, lambda x: lookup(values, state, x).astype(jnp.uint16))  # noqa: B023
            bar.update()
            kept = trees.byte_count((state.projection, state.keys.codebook))
            stage = FeatureStage(kept, seconds + time.perf_counter() - began)
            indexed.append(Indexed(values, state, looked_up, stage))
    return indexed


def _with_decoder(key: Key, decoder: nets.MLP, layer: Bottleneck, params: PyTree, stream: Stream) -> PyTree:
    """Params with a decoder that is drawn; behind hidden layers values are too, since zero ones would learn nothing."""
    decoder_key, values_key = jax.random.split(key)
    if decoder.hidden:
        params = params | {"values": jax.random.normal(values_key, params["values"].shape)}
    fetched = layer.read(params, jnp.asarray(stream.train.inputs[np.arange(1)]))
    return params | {"decoder": decoder.init(decoder_key, fetched)}


def _train_in_dual(
    run: Run,
    name: str,
    layer: Bottleneck,
    params: PyTree,
    stream: Stream,
    key: Key,
    seed: int,
    *,
    classes: int,
    learning_rate: float,
    epochs: int,
    batch_size: int,
) -> Result:
    """What `continual.run` leaves, of one seed whose values are trained in the dual; goes on where it was stopped."""
    path = run.checkpoints(name) / f"values_{seed}.npz"
    bits = np.ravel(jax.random.key_data(key)).tolist()
    began, stages = time.perf_counter(), len(stream.train_sets)
    answers = jax.jit(
        lambda params, indices: jnp.argmax(bottleneck.vote(layer.read(params, indices))[..., :classes], -1)
    )
    tests = [Examples(stream.test.inputs[part.rows], stream.test.labels[part.rows]) for part in stream.test_sets]

    def accuracy(params: PyTree) -> np.ndarray:
        return np.array([np.mean(np.asarray(answers(params, test.inputs)) == test.labels) for test in tests])

    most = max(len(part.rows) for part in stream.train_sets)
    # The same in each call, so that it compiles once.
    per_call = max(number for number in range(1, _MOST_EPOCHS_A_CALL + 1) if not epochs % number)
    progress: dict[str, Any] = {
        "stage": np.int64(0), "epoch": np.int64(0), "seconds": np.float64(0), "accuracy": np.zeros((stages, stages)),
        "losses": np.zeros((stages, epochs)), "moves": np.zeros((most, classes), np.float32),
    }  # fmt: skip
    untrained = accuracy(params)
    if saved := load_tree(path, (params, progress)):
        params, progress = saved
    before = float(progress["seconds"])

    def save(epoch: int, moves: ArrayLike) -> None:
        progress["moves"], progress["epoch"] = np.asarray(moves), np.int64(epoch)
        progress["seconds"] = np.float64(before + time.perf_counter() - began)
        save_tree(path, (params, progress))

    written = time.perf_counter()
    with (
        count_compilations(("coincidences", "train_votes", "end_votes")) as compilations,
        run.bar(name, stages * epochs, "epoch") as bar,
    ):
        bar.update(int(progress["stage"]) * epochs + int(progress["epoch"]))
        for stage in range(int(progress["stage"]), stages):
            rows = stream.train_sets[stage].rows
            # Smaller tasks are filled up with examples that no step takes, so that each program compiles once.
            filled = np.pad(rows, (0, most - len(rows)), mode="edge")
            votes = bottleneck.begin_votes(
                params, stream.train.inputs[filled], np.asarray(stream.train.labels)[filled], classes=classes
            )
            votes = votes._replace(moves=jnp.asarray(progress["moves"]))
            for epoch in range(int(progress["epoch"]), epochs, per_call):
                # In the order of `continual.run`.
                orders = [
                    _order(np.random.default_rng([*bits, stage, number]).permutation(len(rows)), most, batch_size)
                    for number in range(epoch, epoch + per_call)
                ]
                votes, loss = bottleneck.train_votes(votes, np.concatenate(orders), learning_rate=learning_rate)
                progress["losses"][stage, epoch : epoch + len(orders)] = float(loss)
                bar.update(len(orders))
                bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
                if run.due(written):
                    written = time.perf_counter()
                    save(epoch + len(orders), votes.moves)
            params = bottleneck.end_votes(params, votes)
            progress["accuracy"][stage] = accuracy(params)
            progress |= {"stage": np.int64(stage + 1), "epoch": np.int64(0), "moves": np.zeros_like(progress["moves"])}
            if run.due(written):
                written = time.perf_counter()
                save(0, progress["moves"])
    examples = epochs * sum(len(part.rows) for part in stream.train_sets)
    history = [
        {"stage": stage, "epoch": epoch, "loss": float(progress["losses"][stage, epoch])}
        for stage in range(stages)
        for epoch in range(epochs)
    ]
    return Result(
        progress["accuracy"], untrained, history, params, (), trees.parameter_count(params), trees.byte_count(params),
        examples, before + time.perf_counter() - began, dict(compilations),
    )  # fmt: skip


def _order(order: np.ndarray, most: int, batch_size: int) -> np.ndarray:
    """[P, B] int32 with -1 to fill up to the steps that `most` examples take."""
    steps = -(-most // batch_size)
    filled = np.pad(order, (0, steps * batch_size - len(order)), constant_values=-1)
    return filled.reshape(steps, batch_size).astype(np.int32)


def save_tree(path: Path, tree: PyTree) -> None:
    """Writes the leaves of a tree as an npz file, whole or not at all."""
    content = io.BytesIO()
    np.savez(content, *(np.asarray(leaf) for leaf in jax.tree.leaves(tree)))
    files.write_atomic(path, content.getvalue())


def load_tree(path: Path, like: PyTree) -> Any:
    """The tree that `save_tree` wrote; None if there is none.

    Raises:
        ValueError: the file's leaves are not of the shapes and dtypes of `like`.
    """
    if not path.exists():
        return None
    leaves, structure = jax.tree.flatten(like)
    try:
        with np.load(path, allow_pickle=False) as file:
            saved = [file[f"arr_{number}"] for number in range(len(leaves))]
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise bad_argument("out", f"{path}, which cannot be read ({error})", "remove it to begin anew") from error
    if any(a.shape != np.shape(b) or a.dtype != b.dtype for a, b in zip(saved, leaves, strict=True)):
        raise bad_argument("out", f"{path}, which another run left", "remove it to begin anew")
    return jax.tree.unflatten(structure, saved)
