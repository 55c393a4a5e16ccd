"""Runs on a mesh of eight host devices: as on one device up to rounding, with parameters that really are split."""

import functools

import jax
import methods
import numpy as np
import pytest
from helpers import assert_close
from jax.sharding import PartitionSpec
from methods import assert_same, bits, run_method
from test_feeding import streamed

from jaxcl import continual
from jaxcl.continual import Checkpoint
from jaxcl.continual.sharding import Layout, make_mesh

DATA8, BOTH, MODEL8 = {"data": 8}, {"data": 4, "model": 2}, {"model": 8}


@pytest.fixture
def watch(monkeypatch):
    return methods.watch(monkeypatch)


# The mesh


def test_a_mesh_has_all_devices_and_both_axes():
    assert dict(make_mesh(DATA8).shape) == {"data": 8, "model": 1}
    assert dict(make_mesh(MODEL8).shape) == {"data": 1, "model": 8}
    both = make_mesh(BOTH)
    assert both.axis_names == ("data", "model")
    assert [device.id for device in both.devices.flat] == [device.id for device in jax.devices()]


@pytest.mark.parametrize(
    ("axes", "fix"),
    [
        ({"data": 8, "tensor": 1}, "name its axes data and model"),
        ({"data": 4}, "the product of its axes must be the number of devices, here 8"),
        ({"data": 4, "model": 4}, "the product of its axes must be the number of devices, here 8"),
        ({"data": -8, "model": -1}, "the product of its axes must be the number of devices, here 8"),
        ({"data": 0}, "the product of its axes must be the number of devices, here 8"),
        ({}, "the product of its axes must be the number of devices, here 8"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(axes, fix):
    with pytest.raises(ValueError) as caught:
        make_mesh(axes)
    assert str(caught.value) == f"mesh: got {axes}; {fix}"


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((), ()), ((8,), ()), ((3, 5), ()), ((8, 3), ("model", None)), ((4, 8), (None, "model")),
        ((8, 8), (None, "model")), ((3, 9, 6), (None, None, "model")), ((0, 4), ()),
    ],
)  # fmt: skip
def test_a_leaf_is_split_along_its_longest_axis_that_divides_evenly(shape, spec):
    assert Layout(make_mesh(BOTH)).of_state(shape).spec == PartitionSpec(*spec)
    assert Layout(make_mesh(DATA8)).of_state(shape).spec == PartitionSpec()
    assert Layout().of_state(shape) is None


# Runs


@functools.cache
def on_one_device(name):
    return run_method(name, batch_size=8)


def assert_close_results(result, expected):
    np.testing.assert_allclose(result.accuracy, expected.accuracy, atol=1e-4)
    np.testing.assert_allclose(result.untrained, expected.untrained, atol=1e-4)
    for ours, theirs in zip(result.history, expected.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    trees = (result.params, result.strategy_state), (expected.params, expected.strategy_state)
    for ours, theirs in zip(*map(jax.tree.leaves, trees), strict=True):
        if ours.size:
            assert_close(bits(ours), bits(theirs), 1e-3)
    assert (result.examples, result.parameters, result.bytes) == (
        expected.examples, expected.parameters, expected.bytes
    )  # fmt: skip


CASES = {
    "naive": [(DATA8, True), (MODEL8, False)],
    "ewc": [(BOTH, False)],
    "si": [(BOTH, True)],
    "lwf": [(DATA8, False)],
    "er": [(BOTH, True)],
    "der_plus_plus": [(BOTH, False)],
    "a_gem": [(DATA8, True)],
    "key_value_bottleneck": [(DATA8, False), (BOTH, True), (MODEL8, False)],
    "made_up, refreshed": [(BOTH, False)],
}
PROGRAMS = {
    "ewc": ("observe", "end_task"), "si": ("end_task",), "lwf": ("begin_task",), "a_gem": ("observe",),
    "made_up, refreshed": ("begin_task", "refresh", "observe", "end_task"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "axes", "lazy"), [(name, *case) for name, cases in CASES.items() for case in cases])
def test_a_run_on_a_mesh_is_the_run_on_one_device(name, axes, lazy):
    mesh, stream = make_mesh(axes), methods.method(name).stream
    given = jax.tree.map(np.array, methods.method(name).params)
    kept = jax.tree.map(np.copy, given)
    result = run_method(
        name, fresh=True, batch_size=8, mesh=mesh, params=given, stream=streamed(stream) if lazy else stream
    )
    assert_close_results(result, on_one_device(name))
    methods.assert_same_trees(given, kept)  # not consumed
    programs = ("start", "train", "evaluate", *PROGRAMS.get(name, ()))
    assert result.compilations == dict.fromkeys(programs, 1)
    split = 0
    for leaf in jax.tree.leaves((result.params, result.strategy_state)):
        assert len(leaf.sharding.device_set) == 8
        parts = 1 if leaf.sharding.is_fully_replicated else axes.get("model", 1)
        assert leaf.addressable_shards[0].data.size * parts == leaf.size
        wanted = Layout(mesh).of_state(leaf.shape)
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (leaf.shape, leaf.sharding)
        split += parts > 1
    assert split >= (len(result.params) - 1 if "model" in axes else 0)


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"^batch_size: got 12; pass a multiple of the mesh's data axis, 8$"):
        run_method("naive", batch_size=12, mesh=make_mesh(DATA8))


def test_seeds_together_are_trained_in_turn_on_a_mesh():
    strategy, tx, params, stream = methods.method("naive")
    in_turn, together = (
        continual.run_seeds(
            jax.random.split(jax.random.key(0), 2), strategy, tx, [params] * 2, [stream] * 2,
            epochs=1, batch_size=8, mesh=make_mesh(DATA8), together=together,
        )
        for together in (False, True)
    )  # fmt: skip
    for ours, theirs in zip(together, in_turn, strict=True):
        methods.assert_same(ours, theirs)


# Checkpoints


@pytest.mark.parametrize("name", ["made_up, refreshed", "key_value_bottleneck"])
def test_a_run_on_a_mesh_is_taken_up_to_the_bit(name, tmp_path, watch):
    options = {"batch_size": 8, "mesh": make_mesh(BOTH)}
    expected, checkpoint = run_method(name, **options), Checkpoint(tmp_path, 0)
    for calls in (5, 8):
        place, _ = watch.stopped(lambda: run_method(name, checkpoint=checkpoint, **options), calls)
        assert place
    result = run_method(name, checkpoint=checkpoint, **options)
    assert_same(result, expected)
    shardings = ([leaf.sharding for leaf in jax.tree.leaves(each.params)] for each in (result, expected))
    assert all(ours == theirs for ours, theirs in zip(*shardings, strict=True))


@pytest.mark.parametrize("name", ["made_up, refreshed"])
def test_a_run_taken_up_on_a_mesh_compiles_each_program_once(name, tmp_path, monkeypatch):
    options = {"batch_size": 8, "mesh": make_mesh(BOTH), "checkpoint": Checkpoint(tmp_path, 0), "fresh": True}
    with monkeypatch.context() as patched:
        place, _ = methods.watch(patched).stopped(lambda: run_method(name, **options), 8)
    assert place
    assert set(run_method(name, **options).compilations.values()) == {1}


@pytest.mark.parametrize("axes", [(None, BOTH), (BOTH, None)], ids=str)
def test_a_checkpoint_serves_on_another_mesh(axes, tmp_path, watch):
    """Written on one, with a mesh or without, and taken up on the other."""
    begun, ended = (axis and make_mesh(axis) for axis in axes)
    place, _ = watch.stopped(lambda: run_method("er", batch_size=8, mesh=begun, checkpoint=Checkpoint(tmp_path, 0)), 12)
    assert place
    result = run_method("er", batch_size=8, mesh=ended, checkpoint=Checkpoint(tmp_path, 0))
    assert_close_results(result, on_one_device("er"))
    assert all(len(leaf.sharding.device_set) == (8 if ended else 1) for leaf in jax.tree.leaves(result.params))
