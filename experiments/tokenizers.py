"""What the tokenizer experiments share: the quantizers of the table, how each is trained and measured, what is left.

A row of the table is a quantizer of some size, "simvq:65536" say. All rows have the same encoder, decoder, steps and
data order. Each is trained with checkpoints, measured once at the end, and kept in the folder as soon as it is done.
"""

import dataclasses
import io
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.common import BaseConfig, claim_folder, finished_before
from experiments.rows import Outcome, file_name, finish, kept
from experiments.token_prior import sampled_tokens
from jaxcl import files, quantize, report, tokenizer, trees
from jaxcl.continual.checkpoints import Checkpoint, Checkpoints
from jaxcl.continual.sharding import Layout
from jaxcl.quantize import Quantizer
from jaxcl.tokenizer import Adversary, Network, TrainState
from jaxcl.typing import (
    Array,
    ArrayLike,
    Key,
    PyTree,
    RandomAccess,
    bad_argument,
    check_at_least,
    check_between,
    check_choice,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 30  # of the curves over training
MOST_FOR_PRIOR = 20_000  # training examples whose tokens the prior learns
MOST_FAULTY_STEPS = 10  # in a row, after which a run stops
FACTORISED_WIDTH = 8  # Yu et al. 2022, section 3.2: 32 and less are alike


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(BaseConfig):
    """Settings of a tokenizer experiment; the defaults shown are those of the preset."""

    rows: tuple[str, ...] = ("vq:8192", "simvq:8192")
    """The table: quantizer:codes, quantizers being vq, ema_vq, factorised_vq, fsq, lfq and simvq."""
    width: int = 64
    """Of the vectors that are quantized (D)."""
    steps: int = 2000
    """Training steps of each row."""
    batch_size: int = 16
    """Examples in a step."""
    learning_rate: float = 2e-3
    """Of Adam, at most: it rises over the first --warmup-steps and falls to a twentieth along a cosine."""
    quantizer_rate: float = 5.0
    """The quantizer's parameters learn at so many times the learning rate."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises."""
    commitment_weight: float = 0.1
    """Of the commitment loss, a mean over the entries of the vectors."""
    basis_decay: float = 0.05
    """Of the mean square of SimVQ's W, a loss: it keeps codes among the features, for those beyond are never chosen."""
    place: bool = False
    """Before training, put the codes of vq, ema_vq and factorised_vq where data are."""
    validation: bool = False
    """Measure on a fifth of the training set, held out, instead of the test set: for choosing settings."""
    limit: int | None = None
    """Use only so many training examples and a fifth as many test examples: the first images, or clips at random."""
    examples: int = 8
    """Test examples shown in the report, from all over the test set."""
    prior_row: str | None = None
    """Train a masked prior over the tokens of this row, and show in the report what it samples."""
    prior_steps: int = 2000
    """Training steps of the prior."""


class Material(NamedTuple):
    """What is coded, and how: all that images and sound differ in."""

    train: ArrayLike | RandomAccess  # [N, ...], as stored
    test: ArrayLike | RandomAccess  # [N, ...]
    mask: Callable[[Array], Array] | None  # inputs [B, ...] -> which positions hold anything, as quantizers take it
    prepare: Callable[[Array], Array]  # [B, ...] as stored -> inputs [B, ...] of the encoder, jitted
    encoder: Network
    decoder: Network
    loss: Callable[[Array, Array, Array | None], Array]  # (outputs, inputs, mask) -> [B]
    adversary: Adversary | None
    measure: Callable[[Callable[[int, int], tuple[Array, Array]]], dict[str, float]]  # see `_Row.measure`
    figures: Callable[[Mapping[str, np.ndarray]], dict[str, "Figure"]]  # {"original" or row: outputs [examples, ...]}


class Choice(NamedTuple):
    """A quantizer and what its training adds."""

    quantizer: Quantizer
    regulariser: Callable[[PyTree, Array, Array | None], Array] | None = None


def levels_of(codes: int) -> tuple[int, ...]:
    """FSQ levels whose product is `codes`, a power of two from 16 on: as many eights as can be, and fours."""
    bits = bits_of(codes)
    fours = -bits % 3 if bits % 3 != 1 else 2
    return (8,) * ((bits - 2 * fours) // 3) + (4,) * fours


def bits_of(codes: int) -> int:
    """Log2 of a number of codes; ValueError if it is no power of two."""
    if codes < 16 or codes & (codes - 1):
        raise bad_argument("rows", f"{codes} codes", "fsq and lfq take powers of two, 16 or more")
    return codes.bit_length() - 1


def _lfq(codes: int, config: TokenizerConfig, vectors: int) -> Choice:
    bits = bits_of(codes)

    def entropies(params: PyTree, features: Array, mask: Array | None) -> Array:
        layer = params["down"]
        each, together = quantize.lfq_entropies(features @ layer["kernel"] + layer["bias"], mask)
        count = each.size if mask is None else jnp.maximum(mask.sum(), 1)
        return 0.1 * (each.sum() / count - together)  # Yu et al. 2023, appendix

    return Choice(quantize.projected(quantize.lfq(bits), config.width, bits), entropies)


def _simvq(codes: int, config: TokenizerConfig, vectors: int) -> Choice:
    def decay(params: PyTree, features: Array, mask: Array | None) -> Array:
        return config.basis_decay * jnp.square(params["basis"][0]["kernel"]).mean()

    return Choice(quantize.simvq(codes, config.width), decay)


def _ema_vq(codes: int, config: TokenizerConfig, vectors: int) -> Choice:
    even = vectors / codes  # share of a step's vectors; a code with less than a tenth of it counts as dead
    return Choice(
        quantize.ema_vq(
            codes, config.width, decay=0.99, dead_threshold=even / 10, reset_count=even, gradient="straight_through"
        )
    )


def _factorised_vq(codes: int, config: TokenizerConfig, vectors: int) -> Choice:
    narrow = quantize.vq(codes, FACTORISED_WIDTH, metric="cosine")
    return Choice(quantize.projected(narrow, config.width, FACTORISED_WIDTH))


def _fsq(codes: int, config: TokenizerConfig, vectors: int) -> Choice:
    levels = levels_of(codes)
    return Choice(quantize.projected(quantize.fsq(levels), config.width, len(levels)))


QUANTIZERS: dict[str, Callable[[int, TokenizerConfig, int], Choice]] = {  # of codes, settings, vectors in a step
    "vq": lambda codes, config, vectors: Choice(quantize.vq(codes, config.width)),
    "ema_vq": _ema_vq,
    "factorised_vq": _factorised_vq,
    "fsq": _fsq,
    "lfq": _lfq,
    "simvq": _simvq,
}


def run(config: TokenizerConfig, experiment: str, material: Material) -> dict[str, Any]:
    """Trains and measures every row for every seed, writes what came of it, and returns what is in metrics.json."""
    check_at_least("seeds", config.seeds, 1)
    check_at_least("steps", config.steps, 1)
    check_at_least("rows", len(config.rows), 1)
    check_at_least("examples", config.examples, 1)
    check_at_least("prior_steps", config.prior_steps, 1)
    check_between("batch_size", config.batch_size, 1, len(material.train))
    vectors = _vectors(config, material)
    rows = {name: _parse(name, config, vectors) for name in config.rows}  # a misspelt one is told before any work
    if config.prior_row is not None:
        check_choice("prior_row", config.prior_row, rows)
        if material.mask is not None:
            raise bad_argument(
                "prior_row", config.prior_row, "leave it out: a prior knows no empty positions, as of clips"
            )
    for name, row in rows.items():
        _Row(config, material, name, *row, 0)  # so that what is wrong about its training is told as well
    began = time.perf_counter()
    settings = claim_folder(config)
    if (document := finished_before(config.out)) is not None:
        return document
    seeds = range(config.seeds)
    found = {name: [_Row(config, material, name, *row, seed).outcome() for seed in seeds] for name, row in rows.items()}
    histories = {name: of_seeds[0]["history"] for name, of_seeds in found.items()}

    def figures() -> "dict[str, Figure]":
        shown = {name: np.load(_examples_path(config, name, 0), allow_pickle=False) for name in ("original", *rows)}
        if config.prior_row is not None:
            prior = _Row(config, material, config.prior_row, *rows[config.prior_row], 0)
            shown["sampled by a prior"] = prior.sampled()
        return material.figures(shown) | _curves(histories)

    return finish(config, experiment, settings, found, began, figures, histories)


class _Row:
    """One quantizer with one seed."""

    def __init__(
        self, config: TokenizerConfig, material: Material, name: str, codes: int, choice: Choice, seed: int
    ) -> None:
        self._config, self._material, self._name, self._codes, self._seed = config, material, name, codes, seed
        self._tokenizer = tokenizer.tokenizer(material.encoder, material.decoder, choice.quantizer)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, min(config.warmup_steps, config.steps - 1), config.steps,
            config.learning_rate / 20,
        )  # fmt: skip
        tx = optax.chain(
            optax.scale_by_adam(b2=0.95), optax.scale_by_learning_rate(rate), _times(config.quantizer_rate)
        )
        self._trainer = tokenizer.trainer(
            self._tokenizer, tx, material.loss, commitment_weight=config.commitment_weight,
            regulariser=choice.regulariser, adversary=material.adversary,
        )  # fmt: skip
        self._step = jax.jit(self._counted_step, donate_argnums=(1, 2))

    def outcome(self) -> Outcome:
        """Results, costs and history, as kept in the folder; worked out if they are not there yet."""
        path = self._config.out / "rows" / f"{file_name(self._name)}-{self._seed}.json"
        return kept(path, self._work)

    def _work(self) -> Outcome:
        _forget_peak()
        state, history, seconds = self._train()
        began = time.perf_counter()
        total = len(self._material.train) + len(self._material.test)
        with tqdm(desc=f"{self._name} measured", total=total, unit="example", dynamic_ncols=True) as bar:
            usage, before = self._usage(state, bar)
            results = usage | self._quality(state, bar)
        results["parameters"] = trees.parameter_count((state.params, state.state))
        costs = {
            "seconds": seconds,
            "examples_per_second": self._config.steps * self._config.batch_size / seconds,
            "measuring_seconds": before + time.perf_counter() - began,
            "peak_memory": _peak(),
        }
        return {"results": results, "costs": costs, "history": history}

    def sampled(self) -> np.ndarray:
        """What is decoded from tokens that a prior sampled, [examples, ...], like the inputs."""
        config, material = self._config, self._material
        state, _, _ = self._train()  # which is trained: the checkpoint is read
        encode = jax.jit(self._tokenizer.encode)
        tokens = []
        with tqdm(desc=f"{self._name} encoded", unit="example", dynamic_ncols=True) as bar:
            for rows in _pieces(min(len(material.train), MOST_FOR_PRIOR), 4 * config.batch_size):
                tokens.append(np.asarray(encode(state.params, state.state, *self._batch(material.train, rows))))
                bar.update(len(rows))
        grids = np.concatenate(tokens)
        checkpoint = Checkpoint(config.out / "checkpoints", config.checkpoint_seconds)
        drawn, loss = sampled_tokens(
            jax.random.key(self._seed), grids.reshape(len(grids), -1), self._codes, config.examples,
            steps=config.prior_steps, checkpoint=checkpoint,
        )  # fmt: skip
        print(f"The prior over tokens of {self._name}: {loss:.3f} nats a hidden token in its last step.")
        decode = jax.jit(self._tokenizer.decode)
        return np.asarray(decode(state.params, state.state, drawn.reshape(config.examples, *grids.shape[1:])))

    def _train(self) -> tuple[TrainState, list[dict[str, float]], float]:
        """The trained state, what was recorded on the way, and the seconds it took, those before a kill included."""
        config, keeper = self._config, self._keeper("training")
        bar = tqdm(desc=f"{self._name}, seed {self._seed}", total=config.steps, unit="step", dynamic_ncols=True)
        with closing(keeper), bar:
            state, used, record, step_key = self._start(keeper)
            bar.update(record["step"])
            began = time.perf_counter() - record["seconds"]
            for now, (inputs, mask) in self._batches(record["step"]):
                state, used, told = self._step(jax.random.fold_in(step_key, now), state, used, inputs, mask)
                record["step"] = now + 1
                bar.update()
                if (now + 1) * POINTS // config.steps > now * POINTS // config.steps:  # the last step is a point
                    entry = {"step": now + 1} | {name: float(value) for name, value in told.losses.items()}
                    entry["utilisation"] = float(quantize.utilisation(used))
                    entry["perplexity"] = float(quantize.perplexity(used))
                    record["history"].append(entry)
                    used = jnp.zeros_like(used)
                    shown = {name: f"{entry[name]:.4g}" for name in ("reconstruction", "perplexity")}
                    bar.set_postfix(shown, refresh=False)
                self._check(told, now, record, bar)
                if keeper.due() or now + 1 == config.steps:
                    jax.block_until_ready(state)
                    record["seconds"] = time.perf_counter() - began
                    keeper.save((state, used), record)
        return state, record["history"], record["seconds"]

    def _keeper(self, of: str) -> Checkpoints:
        checkpoint = Checkpoint(self._config.out / "checkpoints", self._config.checkpoint_seconds)
        identity = {"row": self._name, "seed": self._seed}
        return Checkpoints(checkpoint, f"{file_name(self._name)}-{self._seed}-{of}", identity, alone=True)

    def _start(self, keeper: Checkpoints) -> tuple[TrainState, Array, dict[str, Any], Array]:
        """State, counts of codes since the last record, the record, and the key of all steps: new, or as they were."""
        init_key, place_key, step_key = jax.random.split(jax.random.key(self._seed), 3)
        first, _ = self._batch(self._material.train, self._order(0)[: self._config.batch_size])
        used = jnp.zeros(self._codes, jnp.int32)
        abstract = jax.eval_shape(lambda key, inputs: (self._trainer.init(key, inputs), used), init_key, first)
        restored = keeper.restore(abstract, Layout(None))
        if restored is not None:
            (state, used), record = restored
            return state, used, record, step_key
        state = jax.jit(self._trainer.init)(init_key, first)
        if self._config.place:
            state = self._placed(place_key, state)
        return state, used, {"step": 0, "seconds": 0.0, "history": [], "faulty": 0}, step_key

    def _batches(self, start: int) -> Iterator[tuple[int, tuple[Array, Array | None]]]:
        """(step, (inputs, mask)) from a step on; which they are, the seed and the step alone decide."""
        size, order_of = self._config.batch_size, -1
        per_epoch = len(self._material.train) // size
        for now in range(start, self._config.steps):
            epoch, place = divmod(now, per_epoch)
            if epoch != order_of:
                order, order_of = self._order(epoch), epoch
            yield now, self._batch(self._material.train, order[place * size : (place + 1) * size])

    def _counted_step(self, key: Array, state: TrainState, used: Array, inputs: Array, mask: Array | None) -> Any:
        state, told = self._trainer.step(key, state, inputs, mask)
        return state, used + quantize.usage(told.indices, self._codes), told

    def _check(self, told: Any, step: int, record: dict[str, Any], bar: "tqdm[Any]") -> None:
        """Says where a step that was not finite went wrong; RuntimeError after too many in a row."""
        if bool(told.sound):
            record["faulty"] = 0
            return
        record["faulty"] += 1
        where = trees.first_not_finite(told.not_finite)
        bar.write(f"{self._name}: step {step} changed nothing: the first values that are not finite are in {where}")
        if record["faulty"] >= MOST_FAULTY_STEPS:
            raise RuntimeError(
                f"{self._name}: {MOST_FAULTY_STEPS} steps in a row were not finite, the first values in {where}; look "
                "at those inputs, or lower --learning-rate"
            )

    def _placed(self, key: Array, state: TrainState) -> TrainState:
        """Codes on features of so many examples that there is a vector for each code, and 32 batches at least."""
        config, quantizer = self._config, self._tokenizer.quantizer
        tokens = self._features(state, self._order(0)[:1]).size // config.width
        rows = self._order(0)[: max(32 * config.batch_size, -(-self._codes // tokens))]
        parts = [self._features(state, rows[at : at + 256]) for at in range(0, len(rows), 256)]
        features = jnp.concatenate([part.reshape(-1, config.width) for part in parts])
        params, own = jax.jit(quantizer.place)(key, state.params["quantizer"], state.state, features)
        return state._replace(params=state.params | {"quantizer": params}, state=own)

    def _features(self, state: TrainState, rows: np.ndarray) -> Array:
        """[rows, ..., D], NaN where a position holds nothing, so that no code is placed there."""
        inputs, mask = self._batch(self._material.train, rows)
        features = jax.jit(self._material.encoder.apply)(state.params["encoder"], inputs)
        return features if mask is None else jnp.where(mask[..., None], features, jnp.nan)

    def _usage(self, state: TrainState, bar: "tqdm[Any]") -> tuple[dict[str, float], float]:
        """Of one pass over the training set, which goes on where it was broken off; and the seconds before that."""
        encode = self._tokenizer.encode

        @jax.jit
        def count(used: Array, state: TrainState, inputs: Array, mask: Array | None) -> Array:
            return used + quantize.usage(encode(state.params, state.state, inputs, mask), self._codes)

        keeper = self._keeper("usage")
        with closing(keeper):
            restored = keeper.restore(jax.ShapeDtypeStruct((self._codes,), jnp.int32), Layout(None))
            used, record = restored or (jnp.zeros(self._codes, jnp.int32), {"examples": 0, "seconds": 0.0})
            before, began = record["seconds"], time.perf_counter()
            bar.update(record["examples"])
            for rows in _pieces(len(self._material.train), 4 * self._config.batch_size):
                if rows[0] < record["examples"]:
                    continue
                used = jax.block_until_ready(count(used, state, *self._batch(self._material.train, rows)))
                record["examples"] = int(rows[-1]) + 1
                bar.update(len(rows))
                if keeper.due():
                    record["seconds"] = before + time.perf_counter() - began
                    keeper.save(used, record)
        counted = {"utilisation": quantize.utilisation(used), "perplexity": quantize.perplexity(used)}
        return {name: float(value) for name, value in counted.items()}, before

    def _quality(self, state: TrainState, bar: "tqdm[Any]") -> dict[str, float]:
        """What `Material.measure` makes of originals and outputs; a few of them are kept for the report."""
        reconstruct, tests = jax.jit(self._tokenizer.reconstruct), len(self._material.test)

        def at(rows: np.ndarray) -> tuple[Array, Array]:
            inputs, mask = self._batch(self._material.test, rows)
            return inputs, reconstruct(state.params, state.state, inputs, mask).outputs

        def of(first: int, last: int) -> tuple[Array, Array]:
            rows = np.arange(first, min(last, tests))
            bar.update(len(rows))
            return at(rows)

        inputs, outputs = at(np.linspace(0, tests - 1, min(self._config.examples, tests)).astype(int))
        for name, array in (("original", inputs), (self._name, outputs)):
            content = io.BytesIO()
            np.save(content, np.asarray(array), allow_pickle=False)
            files.write_atomic(_examples_path(self._config, name, self._seed), content.getvalue())
        return self._material.measure(of)

    def _batch(self, of: ArrayLike | RandomAccess, rows: np.ndarray) -> tuple[Array, Array | None]:
        inputs = self._material.prepare(jnp.asarray(of[rows]))
        return inputs, None if self._material.mask is None else self._material.mask(inputs)

    def _order(self, epoch: int) -> np.ndarray:
        """Rows of the training set, as (seed, epoch) alone decides."""
        return np.random.default_rng((self._seed, epoch)).permutation(len(self._material.train))


def _times(factor: float) -> optax.GradientTransformation:
    """Updates of the quantizer's parameters multiplied; those of the networks as they are."""

    def scale(updates: PyTree, params: PyTree = None) -> PyTree:
        return updates | {"quantizer": jax.tree.map(lambda update: factor * update, updates["quantizer"])}

    return optax.stateless(scale)


def _vectors(config: TokenizerConfig, material: Material) -> int:
    """How many vectors a training step quantizes."""

    def features(key: Key, images: Array) -> Array:
        inputs = material.prepare(images)
        return material.encoder.apply(material.encoder.init(key, inputs), inputs)

    stored = np.asarray(material.train[np.arange(1)])
    batch = jax.ShapeDtypeStruct((config.batch_size, *stored.shape[1:]), stored.dtype)
    return math.prod(jax.eval_shape(features, jax.random.key(0), batch).shape[:-1])


def _parse(row: str, config: TokenizerConfig, vectors: int) -> tuple[int, Choice]:
    """Codes and quantizer of a row."""
    method, _, codes = row.partition(":")
    check_choice("rows", method, QUANTIZERS)
    if not codes.isdecimal():
        raise bad_argument("rows", row, "write it as simvq:65536")
    return int(codes), QUANTIZERS[method](int(codes), config, vectors)


def _pieces(count: int, size: int) -> list[np.ndarray]:
    return np.split(np.arange(count), range(size, count, size))


def _curves(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, "Figure"]:
    def curves(metric: str, factor: float = 1.0) -> dict[str, np.ndarray]:
        return {
            name: np.array([[entry["step"] for entry in history], [factor * entry[metric] for entry in history]])
            for name, history in histories.items()
        }

    return {
        "Codes chosen at least once since the point before, while training (first seed)": report.line_plot(
            curves("utilisation", 100), "training step", "codes in use, %"
        ),
        "Perplexity of the codes chosen since the point before, while training (first seed)": (
            report.line_plot(curves("perplexity"), "training step", "perplexity")
        ),
    }


def _examples_path(config: TokenizerConfig, row: str, seed: int) -> Path:
    return config.out / "rows" / f"{file_name(row)}-{seed}.npy"


def _forget_peak() -> None:
    """Sets the high-water mark of the process's memory back to what it holds now (Linux)."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """The most memory held since `_forget_peak`, in bytes: of the first device, where it tells, or of the process."""
    statistics = jax.devices()[0].memory_stats()
    if statistics:
        return float(statistics["peak_bytes_in_use"])
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("VmHWM:")), float("nan"))
