"""Tasks of texts: the benchmark's layout as files, one space of labels, orders, and what frozen layers make of them."""

import json
import os
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, golden_folder

from experiments import small_t5
from experiments.text_tasks import ORDERS, load_tasks, lower_layers
from jaxcl import data, nets

needs_data = pytest.mark.skipif("JAXCL_DATA" not in os.environ, reason="needs the text pack in the folder JAXCL_DATA")


def write_task(folder, names, train, test):
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text(json.dumps(names))
    for name, rows in (("train", train), ("test", test)):
        written = [{"sentence": text, "label": label} for text, label in rows]
        (folder / f"{name}.json").write_text(json.dumps(written))


@pytest.fixture
def two_tasks(tmp_path):
    """Tasks that share a label, which each has at another place."""
    write_task(tmp_path / "SC" / "a", ["bad", "good"], [("aa", "good"), ("ab", "bad")] * 5, [("at", "bad")])
    write_task(tmp_path / "NLI" / "b", ["good", "other"], [("ba", "good"), ("bb", "other")] * 5, [("bt", "other")])
    return tmp_path


def test_a_task_from_json(two_tasks):
    train, test = data.text_task(two_tasks / "SC" / "a")
    assert (train.texts[:2], train.labels[:2].tolist(), train.label_names) == (["aa", "ab"], [1, 0], ["bad", "good"])
    assert (test.texts, test.labels.tolist()) == (["at"], [0])


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("labels.json", "[", "labels.json: Expecting"),
        ("labels.json", '{"bad": 0}', "labels.json: no list of names"),
        ("labels.json", "[]", "labels.json: no list of names"),
        ("labels.json", '["bad", "bad"]', "labels.json: a name twice"),
        ("train.json", "[" * 100_000, "train.json: .*recursion"),
        ("train.json", '[{"sentence": null, "label": "bad"}]', "train.json: a sentence that is no text"),
        ("train.json", '[{"sentence": "x", "label": "unknown"}]', "train.json: ValueError"),
        ("train.json", '[{"text": "x", "label": "bad"}]', r"train.json: KeyError\('sentence'\)"),
        ("test.json", "[]", "test.json: no texts"),
        ("test.json", "5", "test.json: TypeError"),
    ],
)
def test_a_damaged_task_is_told(two_tasks, name, content, fault):
    (two_tasks / "SC" / "a" / name).write_text(content)
    with pytest.raises(ValueError, match=f"folder: got .*{fault}"):
        data.text_task(two_tasks / "SC" / "a")


def test_labels_of_one_name_are_one(two_tasks):
    tasks, orders = load_tasks(f"json:{two_tasks}", train=8, test=1, validation=False)
    assert [task.name for task in tasks] == ["NLI/b", "SC/a"] and orders == ((0, 1),)
    names = tasks[0].train.label_names
    for task in tasks:
        of_texts = {"aa": "good", "ab": "bad", "at": "bad", "ba": "good", "bb": "other", "bt": "other"}
        for part in (task.train, task.test):
            assert part.label_names == names
            assert [names[label] for label in part.labels] == [of_texts[text] for text in part.texts]
    assert [len(task.train.texts) for task in tasks] == [8, 8]


def test_folders_of_one_name_are_two_tasks(two_tasks):
    write_task(two_tasks / "TC" / "a", ["fine"], [("ca", "fine")], [("ct", "fine")])
    tasks, orders = load_tasks(f"json:{two_tasks}", train=8, test=1, validation=False)
    assert [task.name for task in tasks] == ["NLI/b", "SC/a", "TC/a"] and orders == ((0, 1, 2),)
    with pytest.raises(ValueError, match="data: got tfds:x,x; name each data set once"):
        load_tasks("tfds:x,x", train=8, test=1, validation=False)


def test_validation_texts_are_not_learnt_from(two_tasks):
    numbered = [(f"text {number}", "good") for number in range(10)]
    write_task(two_tasks / "SC" / "c", ["good"], numbered, [("never", "good")])
    tasks, _ = load_tasks(f"json:{two_tasks}", train=100, test=100, validation=True)
    own = next(task for task in tasks if task.name == "SC/c")
    assert len(own.train.texts) == 8 and len(own.test.texts) == 2
    assert set(own.train.texts) | set(own.test.texts) == {text for text, _ in numbered}


def test_a_folder_without_tasks_is_told(tmp_path):
    with pytest.raises(ValueError, match="name: got 'no_such_set', split 'train'"):
        load_tasks("tfds:no_such_set,other", train=1, test=1, validation=False)
    with pytest.raises(ValueError, match="data: got json:"):
        load_tasks(f"json:{tmp_path}", train=1, test=1, validation=False)


@needs_data
@pytest.mark.parametrize("name", ORDERS)
def test_orders_have_each_task_once(name):
    tasks, orders = load_tasks(name, train=5, test=5, validation=False)
    for order, named in zip(orders, ORDERS[name], strict=True):
        assert tuple(tasks[number].name for number in order) == named
    shared = {name for task in tasks if task.name in ("yelp", "amazon") for name in task.train.label_names}
    assert len(shared) == len(tasks[0].train.label_names)


def test_lower_layers_make_vectors_of_tokens_alone(tmp_path):
    net, params = nets.load_bert(golden_folder(tmp_path, "tiny_bert"))
    tokens = jax.random.randint(jax.random.key(0), (3, 7), 1, 60) * (jnp.arange(7) < jnp.array([[7], [4], [1]]))
    encoder = lower_layers(net, params, 1)
    made = encoder.apply(encoder.params, tokens)
    assert made.dtype == jnp.float16
    np.testing.assert_array_equal(np.any(made != 0, axis=-1), tokens != 0)
    whole = net.clone(layers=1).apply(params, tokens, tokens != 0)
    assert_close(made.astype(jnp.float32), jnp.where((tokens != 0)[..., None], whole, 0), 1e-3)


# The small T5


def test_a_span_is_left_out():
    tokens = jnp.asarray([np.r_[np.arange(10, 30), np.zeros(4, int)]], jnp.int32)
    starts = set()
    for seed in range(20):
        shown, answers = (np.asarray(part[0]) for part in small_t5._left_out(jax.random.key(seed), tokens))
        place = int(np.flatnonzero(shown == small_t5.LEFT_OUT)[0])
        span = answers[: small_t5.SPAN - 1]
        assert answers[-1] == small_t5.END
        whole = np.concatenate([shown[:place], span, shown[place + 1 :]])
        np.testing.assert_array_equal(whole[whole != 0], np.arange(10, 30))
        starts.add(place)
    assert len(starts) > 5


class Watched(small_t5.tqdm):
    updates: ClassVar[list[int]] = []

    def update(self, n=1):
        super().update(n)
        self.updates.append(n)
        if len(self.updates) == 10:
            raise KeyboardInterrupt


@needs_data
def test_a_small_t5_is_trained_and_left_as_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    options = ["--vocabulary", "300", "--width", "16", "--layers", "1", "--length", "16", "--batch-size", "8"]
    options = ["--tasks", "cb", *options, "--steps", "60", "--learning-rate", "0.02"]
    arguments = [*options, "--out", str(tmp_path)]
    monkeypatch.setattr(small_t5, "tqdm", Watched)
    monkeypatch.setattr(Watched, "updates", [])
    with pytest.raises(KeyboardInterrupt):
        small_t5.main([*arguments, "--checkpoint-seconds", "0"])
    with pytest.raises(ValueError, match=r"seed: 0 \(now 1\)"):
        small_t5.main([*arguments, "--seed", "1"])
    loss = small_t5.main(arguments)
    assert Watched.updates == [1] * 10 + [9] + [1] * 51  # it went on where the last checkpoint was
    assert loss < 5.2  # nats; 5.7 is a guess among 300
    assert loss == small_t5.main([*options, "--out", str(tmp_path / "undisturbed")])
    weights = (folder / "model.safetensors" for folder in (tmp_path, tmp_path / "undisturbed"))
    assert next(weights).read_bytes() == next(weights).read_bytes()
    net, _ = nets.load_t5(tmp_path)
    assert net.vocabulary == 300
    tokens = data.tokenize(["a small text"], tmp_path / "tokenizer.json", length=16)
    assert tokens[0][np.count_nonzero(tokens[0]) - 1] == small_t5.END
    with pytest.raises(ValueError, match=r"out: got .*; it holds a model"):
        small_t5.main(arguments)
