"""What the main programs cost on TPUs: compiled for each kind of chip, with no TPU at hand.

libtpu, which compiles for TPUs, runs anywhere: pip install "jaxcl[tpu]". The programs are those that continual.run
calls on a mesh of all chips, one step a call, batches split over the chips; and what is called before a run, on frozen
features. Each row is for one device, which is a chip, or one of the two cores of v2, v3 and v4:

* memory for the arguments (with the whole data set, which lies on every device), temporaries and outputs, and for all
of them at once, since outputs take the place of arguments that are consumed;

* FLOPs and bytes accessed in one step, as the compiler counts them;

* the time this takes at least: FLOPs at the chip's peak, or bytes at its memory's bandwidth, whichever is longer. What
passes between devices (collectives, counted in the next column but one) and all waiting come on top;

* roofline: the share of that time that the arithmetic takes, and which of the two limits the step.

The compiler counts bytes that never leave the chip too: memory can limit less than it seems. And it counts what is in a
loop once, and a product in full precision as if it were one in bfloat16, of which it takes six: FLOPs, bytes and times
are too low where a + follows. Only a profile on a TPU says what a step takes; this says where to look, and what fits.

python -m experiments.tpu_report --topologies v5e:2x4 --steps resnet18_naive_train resnet18_ewc_train --effort -1
"""

import dataclasses
import importlib.util
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from experiments.adapter_bodies import ends_of_blocks, queries_and_values
from experiments.card import Card
from experiments.common import run_command
from jaxcl import adapters, bottleneck, coding, continual, gaussian, masks, nearest, nets, quantize, report, tokenizer
from jaxcl.continual import Strategy, streams
from jaxcl.continual.programs import Resident, Tables, compile_programs
from jaxcl.continual.sharding import DATA, MODEL, Layout
from jaxcl.typing import PyTree, bad_argument, check_between, check_choice

CARDS = {
    "": Card(
        "not measured since it has every method's steps; more than an hour",
        "a table: memory, and what limits each program, on v4, v5e, v5p and v6e",
    ),
    "--topologies v5e:8x8 --effort -1": Card(
        "23 min on one core",
        "the same for 64 chips, of less optimised programs, whose temporaries mean little: at most 8.6 GiB of 16",
    ),
}

CLASSES, CLASSES_PER_TASK = 10, 2


class Chip(NamedTuple):
    """Peak figures of one chip."""

    flops: float  # a second, in bfloat16
    bandwidth: float  # bytes a second, of its memory (HBM)


# v2: Jouppi et al. 2020, A domain-specific supercomputer for training deep neural networks. The others: Google's page
# on each, docs.cloud.google.com/tpu/docs/v3 and so on.
CHIPS = {
    "v2": Chip(46e12, 700e9),
    "v3": Chip(123e12, 900e9),
    "v4": Chip(275e12, 1200e9),
    "v5e": Chip(197e12, 819e9),
    "v5p": Chip(459e12, 2765e9),
    "v6e": Chip(918e12, 1638e9),
}


class Program(NamedTuple):
    """A function and what it is compiled for."""

    function: Any  # jitted
    arguments: tuple[PyTree, ...]  # shapes, dtypes and shardings


class Learner(NamedTuple):
    """What a network is trained with."""

    network: Any  # a Linen module
    examples: tuple[int, ...]  # [N, ...], of the data set
    batch_size: int


MLP = Learner(nets.MLP((256, 256), CLASSES), (60_000, 784), 4096)
RESNET18 = Learner(nets.ResNet18(CLASSES), (50_000, 32, 32, 3), 1024)
BASELINES: dict[str, Callable[[continual.strategies.Apply], Strategy]] = {
    "naive": continual.naive,
    "ewc": partial(continual.ewc, strength=1.0),
    "online_ewc": partial(continual.online_ewc, strength=1.0),
    "si": partial(continual.si, strength=1.0),
    "lwf": continual.lwf,
    "er": partial(continual.er, memory_size=2000, memory_batch_size=4096),
    "der_plus_plus": partial(
        continual.der_plus_plus, memory_size=2000, memory_batch_size=4096, logits_strength=0.5, labels_strength=0.5
    ),
    "a_gem": partial(continual.a_gem, memory_size=2000, memory_batch_size=4096),
    "independent": lambda apply: continual.independent(apply, CLASSES // CLASSES_PER_TASK),
}  # fmt: skip
CLOSED_FORMS: dict[str, Callable[[], Strategy]] = {
    "nearest_class_mean": continual.nearest_class_mean,
    "streaming_lda": continual.streaming_lda,
    "ridge_classifier": continual.ridge_classifier,
}
MASKS: dict[str, Callable[..., masks.MaskMethod]] = {
    "ibm": masks.ib_masks,
    "wsn": partial(masks.winning_subnetwork, sparsity=0.8),
    "packnet": partial(masks.packnet, share=0.2, prune_after=100),
}
QUANTIZERS: dict[str, Callable[[], quantize.Quantizer]] = {
    "vq": partial(quantize.vq, 65_536, 128),
    "ema_vq": partial(quantize.ema_vq, 65_536, 128),
    "simvq": partial(quantize.simvq, 65_536, 128),
    "fsq": lambda: quantize.projected(quantize.fsq((8, 8, 8, 5, 5, 5)), 128, 6),
    "lfq": lambda: quantize.projected(quantize.lfq(16), 128, 16),
    "residual_simvq": lambda: quantize.residual(quantize.simvq(1024, 128), 8),
}


def of_loop(
    layout: Layout,
    member: str,
    strategy: Strategy,
    tx: optax.GradientTransformation,
    params: PyTree,
    inputs: jax.ShapeDtypeStruct,
    batch_size: int,
) -> Program:
    """The program `member` of `continual.run` on a class-incremental stream in memory.

    Args:
        layout: of all devices.
        member: a name in `continual.programs.Programs`, "train" or "observe".
        strategy: the method.
        tx: the optimizer.
        params: of any shapes; their values do not matter.
        inputs: [N, ...], of the whole data set.
        batch_size: B.
    """
    few = continual.Examples(np.zeros((CLASSES, *inputs.shape[1:]), inputs.dtype), np.arange(CLASSES))
    stream = streams.class_incremental(None, few, few, classes_per_task=CLASSES_PER_TASK)
    programs = compile_programs(
        strategy, tx, stream.pipeline, steps_per_call=1, layout=layout, together=False, shared=True
    )
    whole = partial(placed, layout)
    count, batches = inputs.shape[0], -(-inputs.shape[0] // batch_size)
    rows = placed(layout, jax.ShapeDtypeStruct((batches, batch_size), jnp.int32), None, DATA)
    source = Resident(whole(inputs), whole(jax.ShapeDtypeStruct((count,), jnp.int32)), rows, rows)
    eligible = jnp.asarray(stream.eligible)
    tables = whole(Tables(eligible, eligible, stream.view_table))
    key, number = whole(jax.eval_shape(jax.random.key, 0)), jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(programs.start, key, split(layout, params), tables, source)
    arguments = key, split(layout, state), tables, source, number, number, number
    return Program(getattr(programs, member), arguments)


def of_learner(
    layout: Layout, member: str, strategy_of: Callable[[continual.strategies.Apply], Strategy], learner: Learner
) -> Program:
    """`of_loop` for a network under Adam."""
    inputs = jax.ShapeDtypeStruct(learner.examples, jnp.float32)
    example = jax.ShapeDtypeStruct((1, *learner.examples[1:]), jnp.float32)
    params = jax.eval_shape(learner.network.init, jax.eval_shape(jax.random.key, 0), example)
    strategy = strategy_of(learner.network.apply)
    return of_loop(layout, member, strategy, optax.adam(1e-3), params, inputs, learner.batch_size)


def of_closed_form(layout: Layout, strategy_of: Callable[[], Strategy]) -> Program:
    """The one pass of a classifier of features as wide as EfficientNet-lite0's, 4,096 at a time."""
    features = jax.ShapeDtypeStruct((50_000, 1280), jnp.float32)
    return of_loop(layout, "observe", strategy_of(), optax.set_to_zero(), (), features, 4096)


def of_masks(layout: Layout, name: str, method_of: Callable[..., masks.MaskMethod]) -> Program:
    """A step of a mask a task in ResNet-18 or AlexNet with batch normalisation over all devices, on 2,048 images."""
    inputs, tasks = jax.ShapeDtypeStruct((50_000, 32, 32, 3), jnp.float32), CLASSES // CLASSES_PER_TASK
    make: Any = nets.AlexNet if name == "alexnet" else partial(nets.ResNet18, normalisation="batch")
    head, net = "head" if name == "alexnet" else "Dense_0", make(CLASSES, training=True)
    method = method_of(lambda path: path.endswith("kernel") and head not in path, tasks)
    key = jax.eval_shape(jax.random.key, 0)
    params = jax.eval_shape(net.init, key, jax.ShapeDtypeStruct((1, *inputs.shape[1:]), jnp.float32))
    masked, _ = jax.eval_shape(method.init, key, params)
    strategy = continual.masked_network(method, net.apply, penalty_weight=1e-3)
    tx = masks.separate_rates(optax.adam(1e-3), optax.adam(1e-3))
    return of_loop(layout, "train", strategy, tx, masked, inputs, 2048)


def of_bottleneck(layout: Layout, member: str, *, split_codebooks: bool = False) -> Program:
    """A step of the key-value bottleneck at its published size, on features as wide as EfficientNet-lite0's.

    The batch is split over devices, or the codebooks are: whole ones in a look-up, and in training the pairs of each,
    as `Layout` splits a state.
    """
    width, batch_size = 1280, 256
    layer = bottleneck.discrete_key_value_bottleneck(width, CLASSES)
    key = jax.eval_shape(jax.random.key, 0)
    params, state = jax.eval_shape(layer.init, key)
    if member == "train":
        if split_codebooks:
            mesh: Any = layout.mesh
            layout = Layout(Mesh(mesh.devices.T, (DATA, MODEL)))
        indices = jax.ShapeDtypeStruct((50_000, *state.usage.shape[:1], 1), jnp.uint16)
        strategy, tx = continual.key_value_bottleneck(layer), bottleneck.sparse_sgd(0.3, max_norm=1.0)
        return of_loop(layout, member, strategy, tx, params, indices, batch_size)
    split_batch, split_state = (None, DATA) if split_codebooks else (DATA, None)
    features = placed(layout, jax.ShapeDtypeStruct((batch_size, width), jnp.float32), split_batch)
    stored = placed(layout, params, split_state), placed(layout, state, split_state), features
    if member == "lookup":
        return Program(jax.jit(layer.lookup), stored)
    return Program(jax.jit(layer.fit_keys), (placed(layout, key), *stored))


def of_search(layout: Layout, vectors: int, codes: int, *, split_codes: bool = False) -> Program:
    """The nearest of `codes` to each of `vectors`, 128 wide; vectors are split over devices, or codes."""
    x, codebook = (jax.ShapeDtypeStruct((count, 128), jnp.float32) for count in (vectors, codes))
    if not split_codes:
        return Program(jax.jit(nearest.nearest_codes), (placed(layout, x, DATA), placed(layout, codebook)))
    search = jax.shard_map(
        partial(nearest.nearest_codes, axis_name=DATA), mesh=layout.mesh, in_specs=(P(), P(DATA)), out_specs=P()
    )
    return Program(jax.jit(search), (placed(layout, x), placed(layout, codebook, DATA)))


def of_quantizer(layout: Layout, quantizer_of: Callable[[], quantize.Quantizer]) -> Program:
    """Codes of 32,768 vectors, 128 wide and split over devices, the gradients of losses, and what is averaged."""
    quantizer = quantizer_of()
    key = jax.eval_shape(jax.random.key, 0)
    params, state = jax.eval_shape(quantizer.init, key)

    def step(key: jax.Array, params: PyTree, state: PyTree, x: jax.Array) -> tuple[PyTree, PyTree]:
        def loss(params: PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = quantizer.quantize(params, state, x)
            return jnp.mean(found.commitment_loss + found.codebook_loss) + found.codes.mean(), found.indices

        gradients, indices = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return gradients, quantizer.update(key, params, state, x, indices)

    x = placed(layout, jax.ShapeDtypeStruct((32_768, 128), jnp.float32), DATA)
    return Program(jax.jit(step), (*placed(layout, (key, params, state)), x))


def of_tokenizer(layout: Layout) -> Program:
    """A step of SimVQ with 262,144 codes in VQGAN's networks, on 256 images of 128 x 128, split over devices."""
    multipliers = (1, 1, 2, 4)
    made = tokenizer.tokenizer(
        nets.ConvEncoder(128, 64, multipliers), nets.ConvDecoder(3, 64, multipliers), quantize.simvq(262_144, 128)
    )
    trainer = tokenizer.trainer(
        made, optax.adam(1e-4), lambda outputs, inputs, _: jnp.abs(outputs - inputs).mean((1, 2, 3))
    )
    images = jax.ShapeDtypeStruct((256, 128, 128, 3), jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    state = jax.eval_shape(trainer.init, key, images)
    arguments = placed(layout, key), placed(layout, state), placed(layout, images, DATA)
    return Program(jax.jit(trainer.step, donate_argnums=1), arguments)


def of_compression(layout: Layout, member: str) -> Program:
    """LeNet-5 in 896 blocks of 30 values, split over devices: a step on 4,096 images, or 20 bits for each block."""
    net = nets.LeNet5(CLASSES)
    key = jax.eval_shape(jax.random.key, 0)
    params = jax.eval_shape(net.init, key, jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32))
    values = {"params/Dense_0/kernel": 11_800, "params/Conv_1/kernel": 9_000}
    blocks = coding.layout_of(params, width=30, values=values)
    if member == "encode":
        one = placed(layout, jax.ShapeDtypeStruct((blocks.blocks, blocks.width), jnp.float32), DATA)
        numbers = placed(layout, jax.ShapeDtypeStruct((blocks.blocks,), jnp.uint32), DATA)
        seed = placed(layout, jax.ShapeDtypeStruct((), jnp.uint32))
        q, p = gaussian.Gaussian(one, one), gaussian.Gaussian(one, one)
        return Program(jax.jit(coding.orc(20).encode), (placed(layout, key), seed, numbers, q, p))

    def loss(params: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, labels = batch
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, images), labels).mean()

    posterior_of = {"mean_kl": coding.mean_kl_posterior, "mean_var": coding.mean_var_posterior}[member]
    trainer = coding.trainer(blocks, posterior_of(blocks, 14.0), optax.adam(1e-3), loss)
    state = jax.eval_shape(trainer.init, key, params)
    progress = jax.eval_shape(lambda: coding.nothing_coded(blocks))

    def by_block(leaf: jax.ShapeDtypeStruct) -> PyTree:
        return placed(layout, leaf, *((DATA,) if leaf.shape[:1] == (blocks.blocks,) else ()))

    batch = jax.ShapeDtypeStruct((4096, 28, 28, 1), jnp.float32), jax.ShapeDtypeStruct((4096,), jnp.int32)
    arguments = (
        placed(layout, key), jax.tree.map(by_block, state), jax.tree.map(by_block, progress),
        tuple(placed(layout, leaf, DATA) for leaf in batch),
    )  # fmt: skip
    return Program(jax.jit(trainer.step, donate_argnums=1), arguments)


def of_adapters(layout: Layout, network: str, *, split_over: str, name: str = "oa_adapter") -> Program:
    """A step of adapters, with room for 15 tasks, in a frozen T5-large or 7-billion-weight Llama.

    OA-Adapter's are after each block; LoRA and O-LoRA are at queries and values.

    Texts of 512 tokens (T5: and answers of 64), two a device, in bfloat16. The network's weights and all else that is
    large are split over all devices that share the batch, or over those that share each text.
    """
    devices = np.asarray(layout.mesh.devices).ravel()  # type: ignore[union-attr]
    parts = 4 if split_over == MODEL else 1
    layout = Layout(Mesh(devices.reshape(-1, parts), (DATA, MODEL)))
    parts = layout.mesh.shape[split_over]  # type: ignore[union-attr]
    texts = jax.ShapeDtypeStruct((2 * devices.size, 512), jnp.int32)
    answers = jax.ShapeDtypeStruct((2 * devices.size, 64), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)
    if network == "t5_large":
        net: Any = nets.T5(32_128, 1024, 24, 24, 16, 64, 4096, dtype=jnp.bfloat16)
        inputs: tuple[jax.ShapeDtypeStruct, ...] = (texts, answers)
    else:
        net, inputs = nets.Llama(32_000, 4096, 32, 32, 32, 128, 11_008, dtype=jnp.bfloat16), (texts,)
    backbone = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), jax.eval_shape(net.init, key, *inputs)
    )

    method = {
        "oa_adapter": lambda: adapters.oa_adapter(ends_of_blocks, 16, 15, orthogonal_to="outputs"),
        "lora": lambda: adapters.lora(queries_and_values, 8),
        "o_lora": lambda: adapters.o_lora(queries_and_values, 8, 15),
    }[name]()
    adapter, state = jax.eval_shape(method.init, key, backbone)
    tx = optax.adam(1e-3)

    def loss(adapter: PyTree, state: PyTree, backbone: PyTree, inputs: tuple[jax.Array, ...]) -> jax.Array:
        function = adapters.layer_function(method.changes(adapter, state), method.placement)
        logits = nets.through_layers(function, lambda: net.apply(backbone, *inputs))
        labels = jnp.roll(inputs[-1], -1, axis=1)
        found = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return found + method.penalty(adapter, state)[0]

    def step(
        adapter: PyTree, opt_state: PyTree, state: PyTree, backbone: PyTree, inputs: tuple[jax.Array, ...]
    ) -> tuple[PyTree, PyTree, PyTree]:
        gradients = jax.grad(loss)(adapter, state, backbone, inputs)
        updates, opt_state = tx.update(gradients, opt_state)
        return optax.apply_updates(adapter, updates), opt_state, method.track(adapter, state)

    def large(leaf: jax.ShapeDtypeStruct) -> PyTree:
        axes = [axis for axis, length in enumerate(leaf.shape) if length % parts == 0]
        if leaf.size < 2**18 or not axes:
            return placed(layout, leaf)
        longest = max(axes, key=lambda axis: (leaf.shape[axis], axis))
        return placed(layout, leaf, *(split_over if axis == longest else None for axis in range(len(leaf.shape))))

    stored = jax.tree.map(large, (adapter, jax.eval_shape(tx.init, adapter), state, backbone))
    return Program(jax.jit(step, donate_argnums=(0, 1, 2)), (*stored, placed(layout, inputs, DATA)))


# A new method's steps go here: {name: function from a layout of all devices to what is to be compiled}.
STEPS: dict[str, Callable[[Layout], Program]] = {
    **{
        f"mlp_{name}_train": partial(of_learner, member="train", strategy_of=strategy_of, learner=MLP)
        for name, strategy_of in BASELINES.items()
    },
    "mlp_ewc_observe": partial(of_learner, member="observe", strategy_of=BASELINES["ewc"], learner=MLP),
    "resnet18_naive_train": partial(of_learner, member="train", strategy_of=continual.naive, learner=RESNET18),
    "resnet18_ewc_train": partial(of_learner, member="train", strategy_of=BASELINES["ewc"], learner=RESNET18),
    "resnet18_ewc_observe": partial(of_learner, member="observe", strategy_of=BASELINES["ewc"], learner=RESNET18),
    **{f"{name}_observe": partial(of_closed_form, strategy_of=form) for name, form in CLOSED_FORMS.items()},
    "dkvb_train": partial(of_bottleneck, member="train"),
    "dkvb_lookup": partial(of_bottleneck, member="lookup"),
    "dkvb_fit_keys": partial(of_bottleneck, member="fit_keys"),
    "dkvb_train_codebooks_split": partial(of_bottleneck, member="train", split_codebooks=True),
    "dkvb_lookup_codebooks_split": partial(of_bottleneck, member="lookup", split_codebooks=True),
    **{
        f"{network}_{name}_train": partial(of_masks, name=network, method_of=method_of)
        for network in ("resnet18", "alexnet")
        for name, method_of in MASKS.items()
    },
    "nearest": partial(of_search, vectors=65_536, codes=65_536),
    "nearest_262144": partial(of_search, vectors=65_536, codes=262_144),
    "nearest_262144_codes_split": partial(of_search, vectors=65_536, codes=262_144, split_codes=True),
    "nearest_16777216_codes_split": partial(of_search, vectors=65_536, codes=16_777_216, split_codes=True),
    **{
        f"quantize_{name}": partial(of_quantizer, quantizer_of=quantizer_of)
        for name, quantizer_of in QUANTIZERS.items()
    },
    "simvq_tokenizer_train": of_tokenizer,
    "lenet5_mean_kl_train": partial(of_compression, member="mean_kl"),
    "lenet5_mean_var_train": partial(of_compression, member="mean_var"),
    "lenet5_encode_20_bits": partial(of_compression, member="encode"),
    "t5_large_adapters_weights_split": partial(of_adapters, network="t5_large", split_over=DATA),
    "t5_large_adapters_texts_split": partial(of_adapters, network="t5_large", split_over=MODEL),
    "t5_large_lora_weights_split": partial(of_adapters, network="t5_large", split_over=DATA, name="lora"),
    "t5_large_o_lora_weights_split": partial(of_adapters, network="t5_large", split_over=DATA, name="o_lora"),
    "llama_7b_adapters_weights_split": partial(of_adapters, network="llama_7b", split_over=DATA),
    "llama_7b_adapters_texts_split": partial(of_adapters, network="llama_7b", split_over=MODEL),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile for what."""

    topologies: tuple[str, ...] = ("v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x4")
    """Kinds of chips and how they are laid out; v2:2x2, v3:2x2 and v5e:4x4 are others."""
    steps: tuple[str, ...] = tuple(STEPS)
    """Programs."""
    effort: float = 0.0
    """How hard the compiler looks for fast code, from -1 to 1. 0 is what a run compiles with; -1 takes a twentieth of
    the time for a residual network, but shows programs that need far more memory for temporaries."""
    out: Path | None = None
    """Folder for tpu_report.json, which holds the table's numbers unrounded; none is written if not given."""


def placed(layout: Layout, tree: PyTree, *axes: str | None) -> PyTree:
    """Leaves as abstract arrays, split by `layout.named(*axes)`."""
    sharding: Any = layout.named(*axes)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def split(layout: Layout, state: PyTree) -> PyTree:
    """Leaves as abstract arrays, split as a state is."""

    def leaf(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding: Any = layout.of_state(leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(leaf, state)


def compile_only() -> None:
    """Lets JAX compile for TPUs and look for none.

    What it sets counts if it is set before JAX starts its backends, at the first array or the first look at devices;
    so no module may do either while it is imported.

    Raises:
        ImportError: there is no libtpu.
        RuntimeError: JAX runs on something else than CPU already.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError('compiling for TPUs takes libtpu: pip install "jaxcl[tpu]"')
    # libtpu would else ask a server in Google's network what machine this is, complain that it is none of theirs, and
    # let one process at a time load it.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5e-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    jax.config.update("jax_platforms", "cpu")
    if jax.default_backend() != "cpu":
        raise RuntimeError(
            f"JAX runs on {jax.default_backend()} already: run this in a process of its own, python -m "
            "experiments.tpu_report"
        )


def measure(topology: str, step: str) -> dict[str, Any]:
    """The entry of one program in the report: plain numbers, for one device and one step."""
    devices: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    layout = Layout(Mesh(np.asarray(devices).reshape(-1, 1), (DATA, MODEL)))
    function, arguments = STEPS[step](layout)
    compiled = function.lower(*arguments).compile()
    memory, costs, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    chips = len({tuple(device.coords) for device in devices})
    flops, bandwidth = (peak * chips / len(devices) for peak in CHIPS[topology.partition(":")[0]])
    arithmetic, traffic = costs["flops"] / flops, costs["bytes accessed"] / bandwidth
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    return {
        "devices": len(devices),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "memory_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "flops": costs["flops"],
        "bytes_accessed": costs["bytes accessed"],
        "seconds": max(arithmetic, traffic),
        "roofline": arithmetic / max(arithmetic, traffic),
        "limited_by": "arithmetic" if arithmetic >= traffic else "memory",
        "collectives": dict(Counter(re.findall(rf" ({kinds})(?:-start)?\(", text))),
        "loops": len(re.findall(r" while\(", text)),
        "full_precision_products": len(re.findall(r"operand_precision={highest", text)),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Compiles, prints the table, writes the file and returns what is in it."""
    config = tyro.cli(Config, args=argv, description=__doc__)
    for step in config.steps:
        check_choice("steps", step, STEPS)
    for topology in config.topologies:
        if topology.partition(":")[0] not in CHIPS:
            raise bad_argument("topologies", topology, f"write it as v5e:2x4; chips are {', '.join(CHIPS)}")
    check_between("effort", config.effort, -1, 1)
    compile_only()
    jax.config.update("jax_exec_time_optimization_effort", config.effort)
    entries = []
    pairs = [(topology, step) for topology in config.topologies for step in config.steps]
    for topology, step in (bar := tqdm(pairs, unit="program", dynamic_ncols=True)):
        bar.set_description(f"{topology} {step}")
        try:
            costs = measure(topology, step)
        except Exception as error:  # of one program; the others may compile
            costs = {"error": (str(error) or repr(error)).splitlines()[0]}
        entries.append({"topology": topology, "step": step} | costs)
    print(table_of(entries))
    if config.out:
        report.write_json(config.out / "tpu_report.json", {"jax": jax.__version__, "programs": entries})
        print(f"Wrote {config.out}/tpu_report.json.")
    return entries


def table_of(entries: Sequence[dict[str, Any]]) -> str:
    """The table as text, a row an entry."""
    headings = [
        "topology", "program", "arguments MiB", "temporaries", "outputs", "at once", "GFLOP", "MiB accessed", "ms",
        "roofline %", "collectives", "limited by",
    ]  # fmt: skip
    return report.text_table([headings, *map(_row, entries)], names=2)


def _row(entry: dict[str, Any]) -> list[str]:
    names = [entry["topology"], entry["step"]]
    if "error" in entry:
        return [*names, *["-"] * 9, entry["error"]]
    parts = "argument_bytes", "temporary_bytes", "output_bytes", "memory_bytes"
    low = "+" if entry["loops"] or entry["full_precision_products"] else ""
    return [
        *names,
        *(f"{entry[part] / 2**20:,.1f}" for part in parts),
        f"{entry['flops'] / 1e9:,.3f}{low}",
        f"{entry['bytes_accessed'] / 2**20:,.1f}{low}",
        f"{entry['seconds'] * 1e3:,.3f}{low}",
        f"{entry['roofline'] * 100:.0f}",
        str(sum(entry["collectives"].values())),
        entry["limited_by"],
    ]


if __name__ == "__main__":
    run_command(lambda: sys.exit(any("error" in entry for entry in main())))
