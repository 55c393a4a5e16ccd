"""Streams: every task's rows, masks and views against plain NumPy, and one clear error for each bad argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxcl.continual import Examples, streams
from jaxcl.continual.compilations import count_compilations

pytestmark = pytest.mark.core

BY_CLASS = [streams.class_incremental, streams.task_incremental]


SHAPE = (2, 2, 3)  # an image with channels, and twelve values to permute


def examples(count, classes, shape=SHAPE, seed=0):
    """Random inputs; the labels go round so that each class has one example or more."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % classes).astype(np.int32)
    return Examples(random.normal(size=(count, *shape)).astype(np.float32), labels)


def train_and_test(shape=SHAPE):
    """31 and 12 examples of six classes."""
    return examples(31, 6, shape), examples(12, 6, shape, seed=1)


def task_classes(stream, sets="train"):
    """The set of classes in each task's rows."""
    labels = getattr(stream, sets).labels
    return [sorted(set(labels[part.rows].tolist())) for part in getattr(stream, f"{sets}_sets")]


def seen(stream, inputs, tasks):
    """Inputs as their tasks show them."""
    return np.asarray(jax.jit(stream.view)(stream.view_table, inputs, np.asarray(tasks, np.int32)))


# Class- and task-incremental


@pytest.mark.parametrize("make", BY_CLASS)
@pytest.mark.parametrize("key", [None, 0, 1])
def test_tasks_partition_the_classes_and_the_rows(make, key):
    """Every class is in one task, every row in the task that has its label, in train and test alike."""
    train, test = train_and_test()
    stream = make(None if key is None else jax.random.key(key), train, test, classes_per_task=2)
    classes = task_classes(stream)
    assert [len(group) for group in classes] == [2, 2, 2]
    assert sorted(c for group in classes for c in group) == list(range(6))
    assert task_classes(stream, "test") == classes
    for data, parts in [(train, stream.train_sets), (test, stream.test_sets)]:
        for task, part in enumerate(parts):
            np.testing.assert_array_equal(part.rows, np.flatnonzero(np.isin(data.labels, classes[task])))
            np.testing.assert_array_equal(part.tasks, np.full(len(part.rows), task))
            assert part.rows.dtype == part.tasks.dtype == np.int32


def test_no_key_leaves_classes_in_numerical_order():
    stream = streams.class_incremental(None, *train_and_test(), classes_per_task=2)
    assert task_classes(stream) == [[0, 1], [2, 3], [4, 5]]


def test_a_key_decides_the_order_of_classes():
    """The same key the same order; five keys of 720 possible orders do not all agree with each other."""
    data = train_and_test()
    orders = [
        task_classes(streams.class_incremental(jax.random.key(seed), *data, classes_per_task=1))
        for seed in (0, 0, 1, 2, 3, 4)
    ]
    assert orders[0] == orders[1]
    assert len({str(order) for order in orders}) == 5


@pytest.mark.parametrize("sizes", [[3, 1, 2], (3, 1, 2), np.asarray([3, 1, 2])])
def test_tasks_may_differ_in_size(sizes):
    stream = streams.class_incremental(None, *train_and_test(), classes_per_task=sizes)
    assert task_classes(stream) == [[0, 1, 2], [3], [4, 5]]


def test_one_task_of_all_classes():
    stream = streams.class_incremental(None, *train_and_test(), classes_per_task=6)
    assert task_classes(stream) == [[0, 1, 2, 3, 4, 5]]


def test_class_incremental_lets_any_class_be_the_answer():
    stream = streams.class_incremental(jax.random.key(0), *train_and_test(), classes_per_task=2)
    assert stream.task_known is False
    np.testing.assert_array_equal(stream.eligible, np.ones((3, 6), bool))


@pytest.mark.parametrize("key", [None, 0])
def test_task_incremental_lets_only_the_tasks_classes_be_the_answer(key):
    key = None if key is None else jax.random.key(key)
    stream = streams.task_incremental(key, *train_and_test(), classes_per_task=[1, 3, 2])
    assert stream.task_known is True
    expected = [[c in group for c in range(6)] for group in task_classes(stream)]
    np.testing.assert_array_equal(stream.eligible, expected)


@pytest.mark.parametrize("make", BY_CLASS)
def test_inputs_are_shown_as_they_are_and_never_copied(make):
    train, test = train_and_test()
    stream = make(None, train, test, classes_per_task=2)
    assert stream.train.inputs is train.inputs
    assert stream.test.inputs is test.inputs
    np.testing.assert_array_equal(seen(stream, train.inputs[:4], [0, 1, 2, 0]), train.inputs[:4])


def test_streams_take_jax_arrays():
    train, test = train_and_test()
    on_device = [Examples(*map(jnp.asarray, data)) for data in (train, test)]
    ours = streams.class_incremental(jax.random.key(0), *on_device, classes_per_task=2)
    theirs = streams.class_incremental(jax.random.key(0), train, test, classes_per_task=2)
    for left, right in zip(ours.train_sets + ours.test_sets, theirs.train_sets + theirs.test_sets, strict=True):
        np.testing.assert_array_equal(left.rows, right.rows)


# Blurry


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_blurry_moves_a_share_of_each_task_evenly_to_the_others(share):
    train, test = examples(600, 6), examples(60, 6, seed=1)
    key = jax.random.key(0)
    stream = streams.blurry(key, train, test, classes_per_task=2, share=share)
    plain = streams.class_incremental(jax.random.split(key)[0], train, test, classes_per_task=2)
    assert sorted(np.concatenate([part.rows for part in stream.train_sets]).tolist()) == list(range(600))
    for task, (blurred, own) in enumerate(zip(stream.train_sets, plain.train_sets, strict=True)):
        stayed = np.isin(blurred.rows, own.rows)
        assert stayed.sum() == round((1 - share) * 200)
        for other in plain.train_sets:
            if other is not own:
                assert np.isin(blurred.rows, other.rows).sum() == share * 100
        np.testing.assert_array_equal(blurred.tasks, np.full(len(blurred.rows), task))
        np.testing.assert_array_equal(stream.test_sets[task].rows, plain.test_sets[task].rows)


def test_blurry_depends_on_the_key_alone():
    def rows(seed):
        stream = streams.blurry(jax.random.key(seed), *train_and_test(), classes_per_task=2, share=0.4)
        return [part.rows.tolist() for part in stream.train_sets]

    assert rows(0) == rows(0) != rows(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes_per_task": 2, "share": 1.1}, "share: got 1.1"),
        ({"classes_per_task": 6, "share": 0.1}, "tasks: got 1; pass 2 or more"),
        ({"classes_per_task": 4, "share": 0.1}, "classes_per_task: got 4"),
    ],
)
def test_blurry_checks_its_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        streams.blurry(jax.random.key(0), *train_and_test(), **options)


# Domain-incremental


@pytest.mark.parametrize("shape", [(12,), SHAPE])
def test_permuted_is_one_permutation_a_task_and_the_first_is_the_identity(shape):
    """Seen through a task, 0 .. D-1 shows the task's order; all examples of the task must follow the same one."""
    width = int(np.prod(shape))
    stream = streams.permuted(jax.random.key(0), *train_and_test(shape=shape), tasks=3)
    places = np.arange(width, dtype=np.float32).reshape(shape)
    orders = [seen(stream, places[None], [task])[0].reshape(-1).astype(int) for task in range(3)]
    np.testing.assert_array_equal(orders[0], np.arange(width))
    assert all(sorted(order) == list(range(width)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    inputs = np.random.default_rng(0).normal(size=(5, *shape)).astype(np.float32)
    for task, order in enumerate(orders):
        expected = inputs.reshape(5, -1)[:, order].reshape(inputs.shape)
        np.testing.assert_array_equal(seen(stream, inputs, [task] * 5), expected)


def test_permuted_shows_each_example_of_a_batch_as_its_own_task_does():
    train, test = train_and_test()
    stream = streams.permuted(jax.random.key(0), train, test, tasks=3)
    tasks = [2, 0, 1, 1, 2]
    one_by_one = [seen(stream, train.inputs[i : i + 1], [task])[0] for i, task in enumerate(tasks)]
    np.testing.assert_array_equal(seen(stream, train.inputs[:5], tasks), one_by_one)


def test_permuted_depends_on_the_key():
    data = train_and_test()
    tables = [np.asarray(streams.permuted(jax.random.key(seed), *data, tasks=3).view_table) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(tables[0], tables[1])
    assert not np.array_equal(tables[0], tables[2])


def domain_streams():
    train, test = train_and_test()
    return [
        streams.permuted(jax.random.key(0), train, test, tasks=3),
        streams.rotated(train, test, degrees=[0, 30, 60]),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_domains_show_all_examples_and_classes_in_every_task(which):
    stream = domain_streams()[which]
    assert stream.task_known is False
    np.testing.assert_array_equal(stream.eligible, np.ones((3, 6), bool))
    for data, parts in [(stream.train, stream.train_sets), (stream.test, stream.test_sets)]:
        assert len(parts) == 3
        for task, part in enumerate(parts):
            np.testing.assert_array_equal(part.rows, np.arange(len(data.labels)))
            np.testing.assert_array_equal(part.tasks, np.full(len(data.labels), task))


def images(shape, seed=0):
    return np.random.default_rng(seed).uniform(0.5, 1.0, (3, *shape)).astype(np.float32)


def rotated(shape, degrees):
    return streams.rotated(*train_and_test(shape=shape), degrees=degrees)


@pytest.mark.parametrize(
    ("shape", "turns"),
    [
        *[((5, 5), turns) for turns in (0, 1, 2, 3, 4, -1)],
        *[((4, 4, 3), turns) for turns in (0, 1, 2)],
        *[((3, 6), turns) for turns in (0, 2)],
    ],
)
def test_quarter_turns_equal_rot90(shape, turns):
    """NumPy's rot90 turns counter-clockwise too; a side view keeps its shape only after half turns."""
    inputs = images(shape)
    expected = np.rot90(inputs, turns, axes=(1, 2))
    np.testing.assert_allclose(seen(rotated(shape, [90 * turns]), inputs, [0] * 3), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(6, 6), (5, 8), (6, 5, 2)])
@pytest.mark.parametrize("degrees", [17.0, 45.0, -120.0])
def test_any_turn_equals_linear_interpolation_by_scipy(shape, degrees):
    """SciPy's rotation of order 1, with zeros outside; it turns the same way (checked at 90 degrees)."""
    np.testing.assert_allclose(
        ndimage.rotate(np.arange(4.0).reshape(2, 2), 90, order=1), np.rot90(np.arange(4.0).reshape(2, 2)), atol=1e-12
    )
    inputs = images(shape)
    expected = ndimage.rotate(inputs, degrees, axes=(2, 1), reshape=False, order=1, mode="grid-constant", cval=0.0)
    np.testing.assert_allclose(seen(rotated(shape, [degrees]), inputs, [0] * 3), expected, atol=1e-5)


@pytest.mark.parametrize("degrees", [0, 10, 45, 90, 200])
def test_rotation_mixes_with_weights_of_a_mean(degrees):
    """Weights are not negative and add up to at most 1 (less at the rim), so values stay between 0 and the largest."""
    stream = rotated((5, 6), [degrees])
    weights = np.asarray(stream.view_table[1][0])
    assert weights.shape == (4, 30)
    assert weights.min() >= 0
    assert weights.sum(axis=0).max() <= 1 + 1e-6
    np.testing.assert_allclose(weights.sum(axis=0).reshape(5, 6)[2, 2:4], 1, atol=1e-6)  # the middle sees no rim
    inputs = images((5, 6))
    turned = seen(stream, inputs, [0] * 3)
    assert turned.min() >= 0
    assert turned.max() <= inputs.max() + 1e-6


def test_rotated_batches_may_mix_tasks():
    stream = rotated((4, 4), [0, 90, 180])
    inputs = images((4, 4))
    expected = [np.rot90(inputs[0], 2), inputs[1], np.rot90(inputs[2])]
    np.testing.assert_allclose(seen(stream, inputs, [2, 0, 1]), expected, rtol=1e-6)


def test_rotated_takes_integer_images():
    """Whole numbers of a quarter turn stay what they were."""
    inputs = np.random.default_rng(0).integers(0, 256, (3, 4, 4)).astype(np.uint8)
    np.testing.assert_array_equal(seen(rotated((4, 4), [90]), inputs, [0] * 3), np.rot90(inputs, axes=(1, 2)))


# Joint training and frozen feature stages


@pytest.mark.parametrize("make", [*BY_CLASS, streams.permuted])
def test_joint_is_one_stage_of_all_rows_that_keep_their_tasks(make):
    option = {"tasks": 3} if make is streams.permuted else {"classes_per_task": 2}
    stream = make(jax.random.key(0), *train_and_test(), **option)
    joint = streams.joint(stream)
    assert len(joint.train_sets) == 1
    pairs = sorted(zip(*(field.tolist() for field in joint.train_sets[0]), strict=True))
    expected = [
        pair for part in stream.train_sets for pair in zip(part.rows.tolist(), part.tasks.tolist(), strict=True)
    ]
    assert pairs == sorted(expected)
    assert joint._replace(train_sets=stream.train_sets) == stream  # nothing else changes


def encode(inputs):
    """A frozen stage: [B, ...] to [B, 2, ...]."""
    return jnp.stack([jnp.tanh(inputs), inputs**2], axis=1)


@pytest.mark.parametrize("batch_size", [1, 7, 31, 1000])
def test_map_inputs_equals_the_function_on_all_inputs_and_compiles_once(batch_size):
    """31 train and 12 test examples: 7 leaves ragged last batches, 1000 is more than there are."""
    train, test = train_and_test()
    stream = streams.class_incremental(None, train, test, classes_per_task=2)

    @jax.jit
    def frozen_encoder(inputs):
        return encode(inputs)

    with count_compilations(["frozen_encoder"]) as compilations:
        mapped = streams.map_inputs(stream, frozen_encoder, batch_size=batch_size)
    assert compilations == {"frozen_encoder": 1}
    for ours, data in [(mapped.train, train), (mapped.test, test)]:
        np.testing.assert_allclose(ours.inputs, np.asarray(encode(data.inputs)), rtol=1e-6)
        assert ours.labels is data.labels
    assert mapped._replace(train=train, test=test) == stream


def test_map_inputs_hands_over_full_batches_and_keeps_the_dtype():
    """31 and 12 examples in batches of 8 are four and two calls; indices that come back as uint16 stay uint16."""
    calls = []

    def lookup(inputs):
        calls.append((type(inputs), inputs.shape))
        return np.round(np.abs(inputs) * 100).astype(np.uint16)

    train, test = train_and_test()
    stream = streams.class_incremental(None, train, test, classes_per_task=2)
    mapped = streams.map_inputs(stream, lookup, batch_size=8)
    assert [shape for _, shape in calls] == [(8, *SHAPE)] * 6
    assert all(issubclass(kind, jax.Array) for kind, _ in calls)
    assert mapped.train.inputs.dtype == np.uint16
    np.testing.assert_array_equal(mapped.test.inputs, np.round(np.abs(test.inputs) * 100).astype(np.uint16))


@pytest.mark.parametrize("which", [0, 1])
def test_map_inputs_of_domains_sees_what_each_task_shows(which):
    stream = domain_streams()[which]
    stream = stream._replace(prepare=lambda inputs: inputs + 1)
    mapped = streams.map_inputs(stream, encode, batch_size=7)
    for data, parts, ours, our_parts in [
        (stream.train, stream.train_sets, mapped.train, mapped.train_sets),
        (stream.test, stream.test_sets, mapped.test, mapped.test_sets),
    ]:
        assert len(ours.inputs) == len(ours.labels) == 3 * len(data.labels)
        for task, (part, our_part) in enumerate(zip(parts, our_parts, strict=True)):
            shown = stream.view(stream.view_table, jnp.asarray(data.inputs[part.rows]) + 1, part.tasks)
            np.testing.assert_allclose(ours.inputs[our_part.rows], encode(shown), rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(ours.labels[our_part.rows], data.labels[part.rows])
            assert (our_part.tasks == task).all()
    inputs = jnp.asarray(mapped.train.inputs[:4])
    np.testing.assert_array_equal(mapped.view(mapped.view_table, inputs, jnp.arange(4) % 3), inputs)
    assert mapped.prepare is None


def test_map_inputs_refuses_streams_that_augment():
    stream = streams.class_incremental(None, *train_and_test(), classes_per_task=2)
    stream = stream._replace(augment=lambda key, inputs: inputs)
    with pytest.raises(ValueError, match=r"^stream: got one with `augment`; map a stream without"):
        streams.map_inputs(stream, encode)


def test_map_inputs_needs_a_batch():
    stream = streams.class_incremental(None, *train_and_test(), classes_per_task=2)
    with pytest.raises(ValueError, match=r"^batch_size: got 0; pass 1 or more$"):
        streams.map_inputs(stream, encode, batch_size=0)


# Bad examples

EVERY_STREAM = [
    lambda train, test: streams.class_incremental(None, train, test, classes_per_task=2),
    lambda train, test: streams.task_incremental(None, train, test, classes_per_task=2),
    lambda train, test: streams.permuted(jax.random.key(0), train, test, tasks=3),
    lambda train, test: streams.rotated(train, test, degrees=[0, 90]),
]


def spoilt(data, change):
    inputs, labels = data.inputs.copy(), data.labels.copy()
    return Examples(*change(inputs, labels))


def with_nan(inputs, labels):
    inputs[2, 1, 0, 2] = np.nan
    return inputs, labels


def with_label(value):
    def change(inputs, labels):
        labels[1] = value
        return inputs, labels

    return change


BAD_TRAIN = [
    (with_nan, r"^train\.inputs: got 1 values that are NaN or infinite, the first at \(2, 1, 0, 2\); remove or repair"),
    (with_label(-1), r"^train\.labels: got values from -1 to 5; labels must lie in \[0, 6\)"),
    (lambda x, y: (x[:-1], y), r"^train: got 30 inputs and 31 labels; pass one label an input$"),
    (lambda x, y: (x, y[:-1]), r"^train: got 31 inputs and 30 labels; pass one label an input$"),
    (lambda x, y: (x[:0], y[:0]), r"^train: got 0 inputs and 0 labels; "),
    (lambda x, y: (x, y[:, None]), r"^train\.labels: got shape \(31, 1\); pass an array with 1 axes$"),
    (lambda x, y: (x, y.astype(np.float32)), r"^train\.labels: got dtype float32; pass integer class numbers$"),
    (lambda x, y: (x, y.tolist()), r"^train\.labels: got type list; pass an array$"),
]
BAD_TEST = [
    (with_nan, r"^test\.inputs: got 1 values that are NaN or infinite, the first at \(2, 1, 0, 2\); remove or repair"),
    (with_label(6), r"^test\.labels: got values from 0 to 6; labels must lie in \[0, 6\)"),
    (lambda x, y: (x[:-1], y), r"^test: got 11 inputs and 12 labels; pass one label an input$"),
    (lambda x, y: (x[:0], y[:0]), r"^test: got 0 inputs and 0 labels; "),
]


@pytest.mark.parametrize("make", EVERY_STREAM, ids=["class", "task", "permuted", "rotated"])
@pytest.mark.parametrize(
    ("part", "change", "message"), [(0, *case) for case in BAD_TRAIN] + [(1, *case) for case in BAD_TEST]
)
def test_bad_examples_are_named(make, part, change, message):
    data = list(train_and_test())
    data[part] = spoilt(data[part], change)
    with pytest.raises(ValueError, match=message):
        make(*data)


@pytest.mark.parametrize("make", BY_CLASS)
def test_what_are_no_examples_is_refused(make):
    train, test = train_and_test()
    with pytest.raises(ValueError, match=r"^train: got type tuple; pass continual\.Examples\(inputs, labels\)$"):
        make(None, tuple(train), test, classes_per_task=2)
    with pytest.raises(ValueError, match=r"^test\.inputs: got type list; pass an array$"):
        make(None, train, test._replace(inputs=test.inputs.tolist()), classes_per_task=2)


def test_what_are_no_examples_of_a_domain_is_refused():
    train, test = train_and_test()
    for make in (
        lambda *pair: streams.permuted(jax.random.key(0), *pair, tasks=2),
        lambda *pair: streams.rotated(*pair, degrees=[0.0, 1.0]),
    ):
        with pytest.raises(ValueError, match=r"^train: got type tuple; pass continual\.Examples"):
            make(tuple(train), test)
    swapped = train._replace(inputs=train.inputs.astype(">f4"))
    with pytest.raises(ValueError, match=r"^train\.inputs: got dtype >f4; pass it in the machine's byte order"):
        streams.class_incremental(None, swapped, test, classes_per_task=2)
    with pytest.raises(ValueError, match=r"^classes_per_task: got 2\.0; pass a whole number, or one for each task"):
        streams.class_incremental(None, train, test, classes_per_task=2.0)


def test_labels_of_any_integers_lie_together_and_inputs_of_one_shape():
    train, test = train_and_test()
    other = [part._replace(labels=part.labels.astype(np.uint64)) for part in (train, test)]
    stream = streams.data_sets([(train, test), tuple(other)], classes=6)
    assert stream.train.labels.dtype == np.int32
    short = test._replace(inputs=test.inputs[:, 1:])
    with pytest.raises(
        ValueError, match=r"^tasks\[0\], test: got inputs .*; make all of one shape but for their number"
    ):
        streams.data_sets([(train, short)], classes=6)


def test_memory_maps_are_not_read_through(tmp_path, monkeypatch):
    train, test = train_and_test()
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", train.inputs.dtype, train.inputs.shape)
    mapped[:] = train.inputs
    seen = []
    monkeypatch.setattr("jaxcl.continual.streams.check_finite", lambda name, array: seen.append(name))
    streams.class_incremental(None, train._replace(inputs=mapped), test, classes_per_task=2)
    assert seen == ["test.inputs"]


@pytest.mark.parametrize("make", BY_CLASS)
@pytest.mark.parametrize(
    ("part", "missing", "message"),
    [
        (0, [2, 3], r"^train\.labels: got no example of task 1, classes \[2, 3\]; leave those classes out or pass"),
        (1, [4, 5], r"^test\.labels: got no example of task 2, classes \[4, 5\]; leave those classes out or pass"),
    ],
)
def test_a_task_without_examples_is_named(make, part, missing, message):
    data = list(train_and_test())
    kept = ~np.isin(data[part].labels, missing)
    data[part] = Examples(data[part].inputs[kept], data[part].labels[kept])
    with pytest.raises(ValueError, match=message):
        make(None, *data, classes_per_task=2)


@pytest.mark.parametrize("make", BY_CLASS)
@pytest.mark.parametrize(
    ("classes_per_task", "message"),
    [
        (4, "got 4; the tasks must use up all 6 classes"),
        (7, "got 7; the tasks must use up all 6 classes"),
        ([2, 3], r"got \[2, 3\]; the tasks must use up all 6 classes"),
        ([4, 3], r"got \[4, 3\]; the tasks must use up all 6 classes"),
        (0, "got 0; pass 1 or more"),
        (-2, "got -2; pass 1 or more"),
        ([6, 0], "got 0; pass 1 or more"),
        ([], "got 0; pass 1 or more"),
    ],
)
def test_classes_per_task_must_use_up_the_classes(make, classes_per_task, message):
    with pytest.raises(ValueError, match=f"^classes_per_task: {message}$"):
        make(None, *train_and_test(), classes_per_task=classes_per_task)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data: streams.permuted(jax.random.key(0), *data, tasks=0), "^tasks: got 0; pass 1 or more$"),
        (lambda data: streams.rotated(*data, degrees=[]), "^degrees, their number: got 0; pass 1 or more$"),
        (
            lambda data: streams.rotated(*data, degrees=[90]),
            r"^train\.inputs: got shape \(31, 3\); pass an array with 3 or 4 axes$",
        ),
    ],
)
def test_domains_check_their_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(train_and_test(shape=(3,)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int64])
def test_labels_of_any_integer_dtype_make_the_same_stream(dtype):
    labels = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    examples = streams.Examples(np.ones((8, 2), np.float32), labels.astype(dtype))
    stream = streams.class_incremental(None, examples, examples, classes_per_task=np.int64(2))
    # Classes 0 and 1 stand at these rows.
    np.testing.assert_array_equal(stream.train_sets[0].rows, [0, 1, 4, 5])


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (((2, 3), [0.0, 1.0]), ((2, 3), [0, 1]), "train.labels: got dtype float64; pass integer class numbers"),
        (((0, 3), []), ((2, 3), [0, 1]), "train: got 0 inputs and 0 labels; pass one example or more"),
        (((2, 3), [0, 1]), ((2, 5), [0, 1]), "test.inputs: got shape (2, 5); its examples must be (3,)"),
    ],
)
def test_sets_that_do_not_fit_are_named(train, test, message):
    split = [streams.Examples(np.zeros(shape), np.asarray(labels)) for shape, labels in (train, test)]
    with pytest.raises(ValueError) as caught:
        streams.class_incremental(None, *split, classes_per_task=1)
    assert str(caught.value) == message


def test_degrees_that_are_not_numbers_are_named():
    images = streams.Examples(np.zeros((2, 3, 3)), np.array([0, 1]))
    with pytest.raises(ValueError, match=r"degrees: got 1 values that are NaN or infinite, the first at \(1,\)"):
        streams.rotated(images, images, degrees=[0, float("nan")])
