"""The comparison of coders, as a user runs it."""

import json

import pytest

from experiments import coders

SMOKE = ["--preset", "smoke", "--kl", "2", "--spare-bits", "0", "4", "--samples", "300"]


def test_samples_and_bits_are_compared_and_a_finished_run_is_told(tmp_path, capsys, monkeypatch):
    results = coders.main([*SMOKE, "--out", str(tmp_path)])["results"]
    assert set(results) == {"astar:2:2", *(f"{coder}:2:2:{spare}" for coder in ("mrc", "orc") for spare in (0, 4))}
    means = {row: {name: value["mean"] for name, value in of_row.items()} for row, of_row in results.items()}
    assert means["astar:2:2"]["p_of_first"] > 0.01 and means["astar:2:2"]["overhead_bits"] < 5
    for coder in ("mrc", "orc"):
        few, many = means[f"{coder}:2:2:0"], means[f"{coder}:2:2:4"]
        assert few["deviation_off"] > 0.2 > 2 * abs(many["deviation_off"])
    assert means["orc:2:2:4"]["spent_bits"] < means["mrc:2:2:4"]["spent_bits"]
    assert (tmp_path / "report.html").read_text().count("<svg") == 3
    monkeypatch.setattr(coders, "kept", None)
    document = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert coders.main([*SMOKE, "--out", str(tmp_path)]) == document and "finished" in capsys.readouterr().out


def test_an_interrupted_row_goes_on_where_it_was(tmp_path, monkeypatch):
    options = [*SMOKE, "--spare-bits", "0", "--checkpoint-seconds", "0"]
    monkeypatch.setattr(coders, "AT_ONCE", 100)
    whole = coders.main([*options, "--out", str(tmp_path / "whole")])["results"]
    calls, blocks = [], coders._coded

    def some_blocks(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return blocks(*args)

    monkeypatch.setattr(coders, "_coded", some_blocks)
    with pytest.raises(KeyboardInterrupt):
        coders.main([*options, "--out", str(tmp_path / "cut")])
    results = coders.main([*options, "--out", str(tmp_path / "cut")])["results"]
    assert json.dumps(results) == json.dumps(whole)  # whose deviations, of one seed, are no numbers
    assert len(calls) == 9 + 1  # three rows of three calls, of which only the one that failed was made again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kl", "0"], r"kl: got 0\.0; pass a number from 0\.1 to 26"),
        (["--widths", "0"], "widths: got 0; pass 1 or more"),
        (["--spare-bits", "-3"], "spare_bits: got -3; pass 0 or more"),
        (["--spare-bits"], "spare_bits: got none; pass one number or more"),
    ],
)
def test_bad_options_are_told_before_the_folder_is_taken(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        coders.main([*SMOKE, *options, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
