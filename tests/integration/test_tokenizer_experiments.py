"""The tokenizer experiments, as a user runs them, interrupts them and goes on."""

import dataclasses
import json
import math
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import rows, simvq_audio, simvq_image, tokenizers
from jaxcl import tokenizer

SMOKE = [
    *("--preset", "smoke", "--rows", "lfq:16", "simvq:16"),
    *("--steps", "6", "--limit", "60", "--batch-size", "4"),
]


def written(out):
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("simvq_image")
    return out, simvq_image.main([*SMOKE, "--out", str(out)])


def test_what_is_left_has_the_promised_form(smoke):
    out, _ = smoke
    document = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert set(document) == {"experiment", "preset", "config", "results", "costs", "environment", "seconds"}
    assert [*document["results"]] == ["lfq:16", "simvq:16"]
    for row in document["results"].values():
        assert {"utilisation", "perplexity", "psnr", "ssim", "parameters"} <= set(row)
        assert 0 < row["utilisation"]["mean"] <= 1 <= row["perplexity"]["mean"] <= 16
    for row in document["costs"].values():
        assert set(row) == {"seconds", "examples_per_second", "measuring_seconds", "peak_memory"}
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3 and "simvq:16" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    lines = (out / "history.csv").read_text().splitlines()
    assert lines[0] == "row,step,metric,value" and any(line.startswith("lfq:16,6,regulariser,") for line in lines)


def test_what_is_not_a_number_is_kept_as_none_and_comes_back(tmp_path):
    outcomes = [
        rows.kept(tmp_path / "row.json", lambda: {"results": {"one": 1.0, "undefined": math.nan}}) for _ in range(2)
    ]
    for outcome in outcomes:
        found = rows._columns([outcome["results"]])
        assert found["one"]["mean"] == 1 and math.isnan(found["undefined"]["mean"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--examples", "0"], "examples: got 0; pass 1 or more"),
        (["--batch-size", "0"], "batch_size: got 0; pass a number from 1 to "),
        (["--batch-size", "61"], "batch_size: got 61; pass a number from 1 to 60"),
        (["--commitment-weight", "-1"], "commitment_weight: got -1"),
    ],
)
def test_wrong_options_leave_the_folder_to_the_command_as_it_should_be(option, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        simvq_image.main([*SMOKE, *option, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_goes_on_bit_for_bit(smoke, tmp_path, monkeypatch):
    """Broken off in the middle of the second row, with a checkpoint after each step."""
    arguments = [*SMOKE, "--checkpoint-seconds", "0", "--out", str(tmp_path)]
    check, seen = tokenizers._Row._check, []

    def breaking(self, told, step, record, bar):
        seen.append((self._name, step))
        if (self._name, step) == ("simvq:16", 3):
            raise KeyboardInterrupt
        check(self, told, step, record, bar)

    monkeypatch.setattr(tokenizers._Row, "_check", breaking)
    with pytest.raises(KeyboardInterrupt):
        simvq_image.main(arguments)
    first = seen.copy()
    seen.clear()
    monkeypatch.setattr(
        tokenizers._Row, "_check", lambda self, told, step, record, bar: seen.append((self._name, step))
    )
    simvq_image.main(arguments)
    assert first[-1] == ("simvq:16", 3) and seen[0] == ("simvq:16", 3)
    assert written(tmp_path)["results"] == written(smoke[0])["results"]
    assert (tmp_path / "history.csv").read_bytes() == (smoke[0] / "history.csv").read_bytes()


def test_a_finished_run_is_told_and_other_settings_are_refused(smoke, capsys, monkeypatch):
    out, _ = smoke
    monkeypatch.setattr(tokenizers, "kept", None)
    assert simvq_image.main([*SMOKE, "--out", str(out)]) == written(out) and "finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"out: got .* steps 6 \(now 7\); choose another folder"):
        simvq_image.main([*SMOKE, "--out", str(out), "--steps", "7"])


def test_a_finished_row_is_not_trained_again(smoke, tmp_path, monkeypatch):
    shutil.copytree(smoke[0], tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    monkeypatch.setattr(tokenizers._Row, "_train", None)
    simvq_image.main([*SMOKE, "--out", str(tmp_path / "run")])
    assert written(tmp_path / "run")["results"] == written(smoke[0])["results"]


def test_a_broken_off_pass_over_the_training_set_goes_on(smoke, tmp_path, monkeypatch):
    run = shutil.copytree(smoke[0], tmp_path / "run")
    (run / "metrics.json").unlink()
    (run / "rows" / "simvq-16-0.json").unlink()
    arguments = [*SMOKE, "--checkpoint-seconds", "0", "--out", str(run)]
    pieces, batch, read = tokenizers._pieces, tokenizers._Row._batch, []

    def breaking(count, size):
        yield from pieces(count, size)[:2]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenizers, "_pieces", breaking)
        simvq_image.main(arguments)
    monkeypatch.setattr(tokenizers._Row, "_batch", lambda *args: read.append(args[2].tolist()) or batch(*args))
    simvq_image.main(arguments)
    assert read[1:3] == [list(range(32, 48)), list(range(48, 60))]  # the first is what the state is shaped by
    assert written(run)["results"] == written(smoke[0])["results"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["simvp:16"], "rows: got 'simvp'; choose one of 'vq', "),
        (["simvq"], "rows: got simvq; write it as simvq:65536"),
        (["fsq:1000"], "rows: got 1000 codes; fsq and lfq take powers of two"),
    ],
)
def test_misspelt_rows_are_told_before_any_work(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        simvq_image.main(["--preset", "smoke", "--rows", *rows, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_unknown_data_are_named(tmp_path):
    with pytest.raises(ValueError, match="data: got 'imagenet'; choose one of digits, "):
        simvq_image.main(["--data", "imagenet", "--out", str(tmp_path)])


def test_steps_that_are_never_finite_stop_the_run_and_say_where(tmp_path, monkeypatch):
    trainer = tokenizer.trainer

    def poisoned(*args, **options):
        made = trainer(*args, **options)
        return made._replace(step=lambda key, state, inputs, mask=None: made.step(key, state, inputs * jnp.nan, mask))

    monkeypatch.setattr(tokenizer, "trainer", poisoned)
    with pytest.raises(RuntimeError, match=r"lfq:16: 10 steps in a row were not finite, the first values in inputs \("):
        simvq_image.main([*SMOKE, "--steps", "20", "--out", str(tmp_path)])


@pytest.mark.parametrize("codes", [16, 32, 64, 1024, 4096, 8192, 65536, 262144])
def test_fsq_levels_make_just_so_many_codes(codes):
    levels = tokenizers.levels_of(codes)
    assert np.prod(levels) == codes and set(levels) <= {4, 8} and levels.count(4) <= 2


def test_simvqs_basis_decays_as_the_setting_says():
    config = dataclasses.replace(simvq_image.preset("smoke", "digits"), basis_decay=0.5)
    _, choice = tokenizers._parse("simvq:16", config, 64)
    params = {"basis": [{"kernel": jnp.full((3, 4), -2.0)}]}
    assert choice.regulariser(params, None, None) == 0.5 * 4


def test_ema_vq_puts_a_code_with_less_than_a_tenth_of_an_even_share_on_a_vector():
    config = simvq_image.preset("smoke", "digits")
    material = simvq_image.material_of(config)
    vectors = tokenizers._vectors(config, material)
    assert vectors == config.batch_size * 4 * 4  # digits have 8 x 8 pixels, in patches of 2 x 2
    _, choice = tokenizers._parse("ema_vq:2560", config, vectors)
    x = jax.random.normal(jax.random.key(0), (vectors, config.width))
    params, state = choice.quantizer.init(jax.random.key(1))
    state = state._replace(counts=jnp.full(2560, 0.0102).at[0].set(0.0100))  # a tenth of an even share is 0.01
    after = choice.quantizer.update(jax.random.key(2), params, state, x, jnp.full(vectors, 1))
    np.testing.assert_array_equal(np.flatnonzero(np.isclose(after.counts, 0.1)), [0])


def test_a_prior_of_clips_is_refused(tmp_path):
    config = dataclasses.replace(simvq_image.preset("smoke", "digits"), prior_row="simvq:64", out=tmp_path)
    material = simvq_image.material_of(config)._replace(mask=lambda inputs: jnp.ones(inputs.shape[:-1], bool))
    with pytest.raises(ValueError, match="prior_row: got simvq:64; leave it out: a prior knows no empty positions"):
        tokenizers.run(config, "simvq_image", material)


def test_a_discriminator_and_convolutions_can_be_asked_for(tmp_path):
    document = simvq_image.main(
        ["--preset", "smoke", "--rows", "simvq:16", "--steps", "3", "--limit", "40", "--network", "conv",
         "--hidden", "8", "--adversarial-start", "1", "--out", str(tmp_path)]
    )  # fmt: skip
    assert document["results"]["simvq:16"]["psnr"]["mean"] > 0
    assert "simvq:16,3,adversarial," in (tmp_path / "history.csv").read_text()


# Sound


def test_padding_is_masked_and_silence_inside_a_clip_is_not():
    from jaxcl.data.packs import Clips

    clips = Clips(
        [np.array([0, 5, 0, -10, 0], np.int16), np.arange(20, dtype=np.int16)], np.zeros(2), np.zeros(2), [], 8000
    )
    whole = simvq_audio.padded(clips, 8)
    assert whole.shape == (2, 8) and whole.dtype == np.int16
    assert np.abs(whole).max(axis=1).tolist() == [32766, 32766]
    mask = simvq_audio.sample_mask(simvq_audio.prepare(jnp.asarray(whole)))
    assert mask.sum(axis=1).tolist() == [5, 8] and mask[0, :5].all()


def test_what_share_of_clips_is_scored_is_told(monkeypatch):
    def not_installed(*args, **options):
        raise ImportError

    scores = np.array([0.5, np.nan, 0.7, np.nan])
    monkeypatch.setattr(simvq_audio.reconstruction, "stoi", lambda *args, **options: scores)
    monkeypatch.setattr(simvq_audio.reconstruction, "pesq", not_installed)
    clips = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 5120)), jnp.float32)
    result = simvq_audio.measure(
        lambda first, last: (clips, clips), lambda audio: jnp.zeros(4, int), np.zeros(4, int), 8000
    )
    assert result["stoi"] == pytest.approx(0.6) and result["stoi_clips"] == 0.5
    assert not {"pesq", "pesq_clips"} & set(result)


@pytest.mark.skipif("JAXCL_DATA" not in os.environ, reason="JAXCL_DATA is not set")
def test_spoken_digits_smoke(tmp_path):
    document = simvq_audio.main(["--preset", "smoke", "--rows", "simvq:64", "--steps", "3", "--out", str(tmp_path)])
    row = document["results"]["simvq:64"]
    assert {"mel_distance", "si_sdr", "kept_accuracy", "utilisation"} <= set(row)
    assert np.isfinite([row[name]["mean"] for name in ("mel_distance", "si_sdr")]).all()
    assert (tmp_path / "report.html").read_text().count("<svg") == 3
    jax.clear_caches()
