"""Tokenizers: an encoder, a quantizer and a decoder; and the step that trains them, also against a discriminator."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxcl import trees
from jaxcl.quantize import Quantized, Quantizer
from jaxcl.reconstruction import adaptive_weight, discriminator_hinge_loss, generator_hinge_loss
from jaxcl.typing import Array, Key, PyTree, check_at_least


class Network(Protocol):
    """A network as Linen has it; `init` and `apply` of any other will do."""

    def init(self, key: Key, inputs: Array, /) -> PyTree:
        """Parameters for inputs [B, ...]."""

    def apply(self, params: PyTree, inputs: Array, /) -> Any:
        """Outputs [B, ...] of inputs [B, ...]."""


class Reconstruction(NamedTuple):
    """What a tokenizer makes of inputs [B, ...]."""

    outputs: Array  # [B, ...], as the inputs
    features: Array  # [B, ..., D], what the encoder made and the quantizer took
    quantized: Quantized


class _Reconstruct(Protocol):
    def __call__(self, params: PyTree, state: PyTree, inputs: Array, mask: Array | None = None) -> Reconstruction: ...


class _Encode(Protocol):
    def __call__(self, params: PyTree, state: PyTree, inputs: Array, mask: Array | None = None) -> Array: ...


class Tokenizer(NamedTuple):
    """Inputs to tokens and back: pure functions of params {"encoder", "decoder", "quantizer"}.

    The state is the quantizer's. A mask is the quantizer's too: which positions of the features hold anything.
    """

    init: Callable[[Key, Array], tuple[PyTree, PyTree]]  # (key, inputs [B, ...]) -> (params, state)
    reconstruct: _Reconstruct  # (params, state, inputs [B, ...], mask)
    encode: _Encode  # (params, state, inputs [B, ...], mask) -> indices [B, ...]
    decode: Callable[[PyTree, PyTree, Array], Array]  # (params, state, indices [B, ...]) -> outputs [B, ...]
    quantizer: Quantizer


def tokenizer(encoder: Network, decoder: Network, quantizer: Quantizer) -> Tokenizer:
    """A tokenizer of three parts.

    Args:
        encoder: inputs [B, ...] to features [B, ..., D].
        decoder: codes [B, ..., D] to outputs that are like the inputs.
        quantizer: of vectors [..., D].
    """

    def init(key: Key, inputs: Array) -> tuple[PyTree, PyTree]:
        encoder_key, decoder_key, quantizer_key = jax.random.split(key, 3)
        params: dict[str, PyTree] = {"encoder": encoder.init(encoder_key, inputs)}
        params["decoder"] = decoder.init(decoder_key, encoder.apply(params["encoder"], inputs))
        params["quantizer"], state = quantizer.init(quantizer_key)
        return params, state

    def reconstruct(params: PyTree, state: PyTree, inputs: Array, mask: Array | None = None) -> Reconstruction:
        features = encoder.apply(params["encoder"], inputs)
        quantized = quantizer.quantize(params["quantizer"], state, features, mask)
        return Reconstruction(decoder.apply(params["decoder"], quantized.codes), features, quantized)

    def encode(params: PyTree, state: PyTree, inputs: Array, mask: Array | None = None) -> Array:
        features = encoder.apply(params["encoder"], inputs)
        return quantizer.quantize(params["quantizer"], state, features, mask).indices

    def decode(params: PyTree, state: PyTree, indices: Array) -> Array:
        return decoder.apply(params["decoder"], quantizer.lookup(params["quantizer"], state, indices))

    return Tokenizer(init, reconstruct, encode, decode, quantizer)


class Adversary(NamedTuple):
    """A discriminator to train against (Esser et al. 2021, section 3.1)."""

    network: Network  # inputs [B, ...] to logits of any shape
    tx: optax.GradientTransformation  # the discriminator's optimizer
    last_layer: Callable[[str], bool]  # which paths of the decoder's parameters are its last layer's
    start: int = 0  # the step from which on it counts; before, only the discriminator learns
    weight: float = 0.8  # of the generator's loss, before the adaptive one


class TrainState(NamedTuple):
    """What a training step takes and gives."""

    params: PyTree  # the tokenizer's
    state: PyTree  # the quantizer's
    optimizer: PyTree
    adversary: PyTree  # (parameters, optimizer state) of the discriminator; None without one
    step: Array  # [] int32, steps made


class Stages(NamedTuple):
    """Where a step can go wrong, in the order in which it passes there: numbers of values that are NaN or infinite."""

    inputs: Array  # []
    features: Array  # []
    outputs: Array  # []
    loss: Array  # []
    gradients: PyTree  # [] each, in the structure of params
    adversary: PyTree  # [] each, in the structure of the discriminator's parameters; None without one


class StepReport(NamedTuple):
    """What a training step tells."""

    losses: dict[str, Array]  # [] each, means over the batch; "total" is what was minimised
    indices: Array  # [B, ...], as in `Quantized`
    sound: Array  # [] bool, whether all values were finite; if not, nothing was changed but the count of steps
    not_finite: Stages  # where they were not; see `trees.first_not_finite`


class Trainer(NamedTuple):
    """How a tokenizer is trained: pure functions."""

    init: Callable[[Key, Array], TrainState]  # (key, inputs [B, ...])
    step: Callable[[Key, TrainState, Array, Array | None], tuple[TrainState, StepReport]]  # (key, state, inputs, mask)


def trainer(
    tokenizer: Tokenizer,
    tx: optax.GradientTransformation,
    loss: Callable[[Array, Array, Array | None], Array],
    *,
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    regulariser: Callable[[PyTree, Array, Array | None], Array] | None = None,
    adversary: Adversary | None = None,
) -> Trainer:
    """The training of a tokenizer.

    What is minimised is the mean of `loss`, plus the mean of commitment and codebook losses over all entries of the
    vectors (the number of vectors times D, as most codebases have it) by their weights, plus the rest as given. A step
    in which any value is not finite changes nothing, and says where that began.

    Args:
        tokenizer: what is trained.
        tx: its optimizer.
        loss: (outputs, inputs, mask) -> [B].
        commitment_weight: of |x - sg(code)|^2 / D; 0.25 is what SimVQ's authors published.
        codebook_weight: of |sg(x) - code|^2 / D.
        regulariser: (the quantizer's params, features [B, ..., D], mask) -> [], such as the entropies of `lfq`; None
            for none.
        adversary: a discriminator; None for none.

    Raises:
        ValueError: a negative weight.
    """
    check_at_least("commitment_weight", commitment_weight, 0)
    check_at_least("codebook_weight", codebook_weight, 0)

    def init(key: Key, inputs: Array) -> TrainState:
        own_key, adversary_key = jax.random.split(key)
        params, state = tokenizer.init(own_key, inputs)
        rival = None
        if adversary is not None:
            weights = adversary.network.init(adversary_key, inputs)
            rival = weights, adversary.tx.init(weights)
        return TrainState(params, state, tx.init(params), rival, jnp.int32(0))

    def total(
        params: PyTree, before: TrainState, inputs: Array, mask: Array | None
    ) -> tuple[Array, tuple[Reconstruction, dict[str, Array]]]:
        out = tokenizer.reconstruct(params, before.state, inputs, mask)
        vectors = out.quantized.commitment_loss.size if mask is None else jnp.maximum(mask.sum(), 1)
        entries = vectors * out.features.shape[-1]
        losses = {
            "reconstruction": loss(out.outputs, inputs, mask).mean(),
            "commitment": commitment_weight * out.quantized.commitment_loss.sum() / entries,
            "codebook": codebook_weight * out.quantized.codebook_loss.sum() / entries,
        }
        if regulariser is not None:
            losses["regulariser"] = regulariser(params["quantizer"], out.features, mask)
        if adversary is not None:
            losses["adversarial"] = against(adversary, params, before, out, inputs, mask)
        return sum(losses.values(), start=jnp.float32(0)), (out, losses)

    def against(
        rival: Adversary, params: PyTree, before: TrainState, out: Reconstruction, inputs: Array, mask: Array | None
    ) -> Array:
        """The generator's loss, weighed so that it pulls the decoder's last layer as hard as the reconstruction."""
        judge = before.adversary[0]
        fixed, indices = jax.lax.stop_gradient((params, out.quantized.indices))
        last = trees.select_paths(fixed["decoder"], rival.last_layer)

        def objective(outputs: Array) -> Array:
            return generator_hinge_loss(rival.network.apply(judge, outputs)).mean()

        def gradient_of(objective: Callable[[Array], Array]) -> PyTree:
            def of_last_layer(decoder: PyTree) -> Array:
                decoder = jax.tree.map(
                    lambda is_last, leaf: leaf if is_last else jax.lax.stop_gradient(leaf), last, decoder
                )
                return objective(tokenizer.decode(fixed | {"decoder": decoder}, before.state, indices))

            return jax.grad(of_last_layer)(fixed["decoder"])

        weight = adaptive_weight(
            gradient_of(lambda outputs: loss(outputs, inputs, mask).mean()), gradient_of(objective)
        )
        return jnp.where(before.step >= rival.start, rival.weight * weight, 0) * objective(out.outputs)

    def step(key: Key, before: TrainState, inputs: Array, mask: Array | None = None) -> tuple[TrainState, StepReport]:
        (value, (out, losses)), gradients = jax.value_and_grad(total, has_aux=True)(before.params, before, inputs, mask)
        losses["total"] = value
        updates, optimizer = tx.update(gradients, before.optimizer, before.params)
        params = optax.apply_updates(before.params, updates)
        state = tokenizer.quantizer.update(
            key, before.params["quantizer"], before.state, out.features, out.quantized.indices
        )
        rival, rival_gradients = None, None
        if adversary is not None:
            losses["discriminator"], rival_gradients = _discriminate(adversary, before, inputs, out.outputs)
            weights, moments = before.adversary
            updates, moments = adversary.tx.update(rival_gradients, moments, weights)
            rival = optax.apply_updates(weights, updates), moments
        passed = Stages(inputs, out.features, out.outputs, value, gradients, rival_gradients)
        not_finite = jax.tree.map(lambda leaf: jnp.sum(~jnp.isfinite(leaf)), passed)
        sound = jnp.sum(jnp.stack(jax.tree.leaves(not_finite))) == 0
        after = TrainState(params, state, optimizer, rival, before.step + 1)
        kept = before._replace(step=after.step)
        after = jax.tree.map(lambda new, old: jnp.where(sound, new, old), after, kept)
        return after, StepReport(losses, out.quantized.indices, sound, not_finite)

    return Trainer(init, step)


def _discriminate(rival: Adversary, before: TrainState, inputs: Array, outputs: Array) -> tuple[Array, PyTree]:
    """The discriminator's loss and its gradients."""

    def of_weights(weights: PyTree) -> Array:
        real, fake = rival.network.apply(weights, inputs), rival.network.apply(weights, outputs)
        return discriminator_hinge_loss(real, fake).mean()

    return jax.value_and_grad(of_weights)(before.adversary[0])
