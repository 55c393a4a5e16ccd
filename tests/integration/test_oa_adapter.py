"""The adapter experiment, as a user runs it."""

import json

import jax
import jax.numpy as jnp
import pytest
from helpers import golden_folder

from experiments import adapter_findings, oa_adapter
from jaxcl import adapters

SMOKE = ["--preset", "smoke", "--methods", "lora", "oa_inputs", "--oa-at-queries", "--oa-drift-strength", "10"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("oa_adapter")
    oa_adapter.main([*SMOKE, "--answers", "discriminant", "--out", str(out)])
    return out


def test_what_is_left_has_the_promised_form(smoke):
    document = json.loads((smoke / "metrics.json").read_text(), parse_constant=pytest.fail)
    found = document["adapters"]
    assert [*found] == ["lora", "oa_inputs"]
    for name, of_method in found.items():
        for head in ("discriminant", "means", "classifier"):
            assert 0 <= of_method[f"{head}_task_free"]["mean"] <= of_method[f"{head}_task_told"]["mean"] <= 1
        # The loop's own answer, from another program.
        assert of_method["discriminant_task_free"]["mean"] == pytest.approx(document["results"][name]["acc"]["mean"])
        assert set(document["costs"][name]) >= {"seconds", "compilations"}
    assert 0 < found["oa_inputs"]["active_rank"]["mean"] <= 16
    assert "active_rank" not in found["lora"]
    page = (smoke / "report.html").read_text()
    assert page.count("<svg") == 6 and "Active ranks by site and task, oa_inputs" in page


@pytest.fixture
def words(tmp_path):
    """Two tasks as JSON files, and a tiny T5 with a tokenizer of their words."""
    tokenizers = pytest.importorskip("tokenizers")
    tasks = {"a": {"good film": "good", "bad film": "bad"}, "b": {"about sports": "sports", "about world": "world"}}
    for task, rows in tasks.items():
        folder = tmp_path / "tasks" / task
        folder.mkdir(parents=True)
        (folder / "labels.json").write_text(json.dumps([*rows.values()]))
        for part in ("train", "test"):
            written = [{"sentence": text, "label": label} for text, label in rows.items()] * 8
            (folder / f"{part}.json").write_text(json.dumps(written))
    model = golden_folder(tmp_path, "tiny_t5_relu")
    vocabulary = ["<pad>", "</s>", "<unk>", "good", "bad", "film", "about", "sports", "world"]
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    words.save(str(model / "tokenizer.json"))
    return ["--data", f"json:{tmp_path / 'tasks'}", "--model", f"t5:{model}"]


def test_a_t5_answers_in_words(words, tmp_path):
    document = oa_adapter.main([
        "--preset", "smoke", *words, "--methods", "frozen", "oa_inputs", "--epochs", "20",
        "--batch-size", "8", "--microbatches", "2", "--oa-rate", "0.03", "--out", str(tmp_path / "run"),
    ])  # fmt: skip
    learnt = document["results"]["oa_inputs"]["learning_accuracy"]["mean"]
    assert document["results"]["frozen"]["acc"]["mean"] < 0.2 and learnt > 0.4
    assert document["adapters"]["frozen"] == {} and "active_rank" in document["adapters"]["oa_inputs"]
    with pytest.raises(ValueError, match=r"methods: got \['ewc'\]; leave these out with t5:"):
        oa_adapter.main(["--preset", "smoke", *words, "--methods", "ewc", "--out", str(tmp_path / "other")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "json:nowhere"], "data: got json:nowhere"),
        (["--oa-inputs-rank", "0"], "rank: got 0"),
        (["--oa-threshold", "0"], "threshold: got 0"),
        (["--microbatches", "5"], "microbatches: got 5; pass a divisor of --batch-size, 32"),
    ],
)
def test_bad_settings_are_told(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        oa_adapter.main(["--preset", "smoke", "--methods", "oa_inputs", *arguments, "--out", str(tmp_path)])


@pytest.mark.parametrize("tasks", [1, 2])
def test_one_task_alone_has_its_figures_too(tasks):
    method = adapters.incremental_lora(lambda path: True, 2, tasks)
    adapter, state = method.init(jax.random.key(0), {"kernel": jnp.eye(4)})
    for task in range(tasks):
        adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
        adapter, state = method.commit(jax.random.key(task), adapter, state)
    captions = adapter_findings.figures_of("lora", state)
    assert any("Singular values" in caption for caption in captions) == (tasks > 1)
