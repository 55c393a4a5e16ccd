"""The adapter experiment, as a user runs it."""

import json

import pytest

from experiments import oa_adapter

SMOKE = ["--preset", "smoke", "--methods", "lora", "oa_inputs"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("oa_adapter")
    oa_adapter.main([*SMOKE, "--answers", "means", "--out", str(out)])
    return out


def test_what_is_left_has_the_promised_form(smoke):
    document = json.loads((smoke / "metrics.json").read_text(), parse_constant=pytest.fail)
    found = document["adapters"]
    assert [*found] == ["lora", "oa_inputs"]
    for name, of_method in found.items():
        assert 0 <= of_method["means_task_free"]["mean"] <= of_method["means_task_told"]["mean"] <= 1
        # The loop's own answer, from another program.
        assert of_method["means_task_free"]["mean"] == pytest.approx(document["results"][name]["acc"]["mean"])
        assert set(document["costs"][name]) >= {"seconds", "compilations"}
    assert 0 < found["oa_inputs"]["active_rank"]["mean"] <= 16
    assert "active_rank" not in found["lora"]
    page = (smoke / "report.html").read_text()
    assert page.count("<svg") == 5 and "Active ranks by site and task, oa_inputs" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "json:nowhere"], "data: got json:nowhere"),
        (["--rank", "0"], "rank: got 0"),
        (["--oa-threshold", "0"], "threshold: got 0"),
    ],
)
def test_bad_settings_are_told(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        oa_adapter.main(["--preset", "smoke", "--methods", "oa_inputs", *arguments, "--out", str(tmp_path)])
