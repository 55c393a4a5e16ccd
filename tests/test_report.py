"""Report: files that are whole or absent, the table's cells, what the figures draw, and a page that stands alone."""

import csv
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxcl import report
from jaxcl.report.plots import COLOURS, _spread

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = '<script>alert("x")</script> & $\\frac{1}{2}$'


def statistics(mean, ci95=None, seeds=5):
    return {"mean": mean, "std": ci95, "ci95": ci95, "values": [mean] * seeds}


@pytest.fixture
def accuracy():
    """Two seeds, three tasks, one method trained task by task and one jointly."""
    first = [[0.9, 0.1, 0.0], [0.5, 0.8, 0.2], [0.4, 0.6, 0.8]]
    second = [[0.7, 0.3, 0.0], [0.5, 0.6, 0.2], [0.2, 0.6, 0.7]]
    return {"naive": np.asarray([first, second]), "joint": np.asarray([[[0.9, 0.8, 0.7]], [[0.9, 0.9, 0.9]]])}


def example_metrics():
    return {
        "experiment": "digits",
        "preset": "quick",
        "config": {"seeds": [0, 1], "note": "a<b", "dkvb": {"codebooks": 64, "extra": {}}, "limit": None},
        "results": {
            "naive": {"acc": statistics(0.412, 0.014), "bwt": statistics(-0.7, 0.02), "bytes": statistics(358_440)},
            HOSTILE: {"acc": statistics(0.9, 0.01), "bwt": statistics(None), "bytes": statistics(1_310_000)},
        },
        "costs": {"naive": {"seconds": statistics(3.25, 0.5), "compilations": statistics(3)}},
        "environment": {"jax": "0.10.2", "python": "3.11.9", "devices": ["TPU v5e", "TPU v5e"]},
        "seconds": 192.4,
    }


@pytest.fixture
def metrics():
    return example_metrics()


# Files


def test_write_json_is_strict(tmp_path):
    path = tmp_path / "metrics.json"
    document = {
        "nan": float("nan"),
        "nested": [{"inf": (-np.inf, np.float32("nan"), 1.5)}],
        "array": np.asarray([[0.1, np.nan], [np.inf, 2.0]]),
        "scalars": [np.int64(3), np.float64(0.1), np.bool_(True), None, "NaN ±"],
    }
    report.write_json(path, document)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse) == {
        "nan": None,
        "nested": [{"inf": [None, None, 1.5]}],
        "array": [[0.1, None], [None, 2.0]],
        "scalars": [3, 0.1, True, None, "NaN ±"],
    }
    assert '\n  "nan": null' in path.read_text(encoding="utf-8")  # two spaces


def test_write_json_refuses_other_objects_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    report.write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        report.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_accuracy_csv_round_trip_is_exact(tmp_path):
    generator = np.random.default_rng(0)
    accuracy = {'er, "256"': generator.random((2, 3, 3)), "joint": generator.random((2, 1, 3), np.float32)}
    accuracy['er, "256"'][1, 0, 2] = np.nan
    seeds = [7, 40]
    path = tmp_path / "accuracy.csv"
    report.write_accuracy_csv(path, accuracy, seeds=seeds)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["method", "seed", "stage", "task", "accuracy"]
    assert len(rows) == 2 * 3 * 3 + 2 * 1 * 3
    read = {method: np.full((2, 3, 3), -1.0) for method in accuracy}
    for row in rows:
        value = float(row["accuracy"]) if row["accuracy"] else np.nan
        read[row["method"]][seeds.index(int(row["seed"])), int(row["stage"]), int(row["task"])] = value
    np.testing.assert_array_equal(read['er, "256"'], accuracy['er, "256"'])
    np.testing.assert_array_equal(read["joint"][:, 2:], accuracy["joint"])  # the joint stage is the last
    assert (read["joint"][:, :2] == -1).all()
    assert sum(row["accuracy"] == "" for row in rows) == 1


def test_accuracy_csv_wants_a_seed_for_each_matrix(tmp_path, accuracy):
    with pytest.raises(ValueError, match=r"seeds: got \[0\]; pass 2"):
        report.write_accuracy_csv(tmp_path / "accuracy.csv", accuracy, seeds=[0])
    assert not list(tmp_path.iterdir())


# Tables


def test_rows_show_percent_intervals_and_humanised_costs():
    results = {
        "dkvb": {
            "acc": statistics(0.9534, 0.0041), "bwt": statistics(-0.00001, 0.012),
            "parameters": statistics(89_610), "bytes": statistics(999_950),
        },
        "joint": {
            "acc": statistics(1.0, 0.0), "bwt": statistics(float("nan")),
            "parameters": statistics(999), "bytes": statistics(4_660_000_000),
        },
        "naive": {"acc": statistics(0.2, 0.01)},
    }  # fmt: skip
    costs = {
        "dkvb": {
            "seconds": statistics(1234.56, 0.4), "examples_per_second": statistics(12_340, 8.0),
            "peak_memory": statistics(1_310_000_000), "compilations": statistics(1),
        },
        "joint": {"seconds": statistics(0.04), "peak_memory": statistics(None)},
        "not in the results": {"seconds": statistics(1)},
    }  # fmt: skip
    assert report.results_rows(results, costs) == [
        ["method", "acc %", "bwt %", "parameters", "bytes", "seconds", "examples/s", "peak memory"],
        ["dkvb", "95.3 ± 0.4", "0.0 ± 1.2", "89.6 k", "1 MB", "1,234.6", "12.3 k", "1.31 GB"],
        ["joint", "100.0 ± 0.0", "-", "999", "4.66 GB", "0.0", "-", "-"],
        ["naive", "20.0 ± 1.0", "-", "-", "-", "-", "-", "-"],
    ]
    assert report.results_rows(results, costs, ["compilations", "acc"]) == [
        ["method", "compilations", "acc %"],
        ["dkvb", "1", "95.3 ± 0.4"],
        ["joint", "-", "100.0 ± 0.0"],
        ["naive", "-", "20.0 ± 1.0"],
    ]


def test_text_table_is_aligned_and_says_what_the_interval_is():
    results = {
        "dkvb": {"acc": statistics(0.953, 0.004), "forgetting": statistics(0.02, 0.113)},
        "linear_probe": {"acc": statistics(0.8), "forgetting": statistics(None)},
    }
    assert report.results_table(results, {"dkvb": {"seconds": statistics(2.0)}}).splitlines() == [
        "Means over 5 seeds; ± is the half-width of the 95 % interval of the mean.",
        "",
        "method             acc %  forgetting %  seconds",
        "-----------------------------------------------",
        "dkvb          95.3 ± 0.4    2.0 ± 11.3      2.0",
        "linear_probe  80.0            -               -",
    ]


def test_a_text_table_may_have_several_columns_of_names():
    rows = [["run", "method", "acc %"], ["a", "naive", "5.0"], ["long", "b", "-"]]
    assert report.text_table(rows, names=2).splitlines() == [
        "run   method  acc %",
        "-------------------",
        "a     naive     5.0",
        "long  b           -",
    ]


def test_table_of_one_seed_has_means_only():
    results = {"naive": {"acc": statistics(0.4, seeds=1), "learning_accuracy": statistics(0.975, seeds=1)}}
    table = report.results_table(results, {})
    assert table.startswith("One seed, so without intervals.\n")
    assert "±" not in table
    assert table.splitlines()[2].split("  ") == ["method", "acc %", "learning accuracy %"]
    assert table.splitlines()[4].split() == ["naive", "40.0", "97.5"]


def test_table_tells_when_methods_differ_in_seeds():
    results = {"naive": {"acc": statistics(0.4, 0.1, seeds=5)}, "joint": {"acc": statistics(0.9, seeds=1)}}
    assert report.results_table(results, {}).startswith("Means over 1 to 5 seeds; ")


def test_results_must_hold_something_to_show():
    with pytest.raises(ValueError, match="results: got no method"):
        report.results_table({}, {})
    with pytest.raises(ValueError, match=r"metrics: got \['speed'\]"):
        report.results_rows({"naive": {"acc": statistics(0.4)}}, {}, ["speed"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "accuracy: got no method"),
        ({"a": np.zeros((3, 3))}, r"accuracy\['a'\]: got shape \(3, 3\)"),
        ({"a": np.zeros(())}, r"accuracy\['a'\]: got shape \(\)"),
        ({"a": np.zeros((2, 2, 3))}, r"accuracy\['a'\]: got shape \(2, 2, 3\)"),
        ({"a": np.zeros((0, 3, 3))}, r"accuracy\['a'\]: got shape \(0, 3, 3\)"),
        ({"a": np.zeros((2, 3, 3)), "b": np.zeros((2, 4, 4))}, r"accuracy\['b'\]: .* must be 3"),
        ({"a": np.full((2, 3, 3), 95.0)}, r"accuracy\['a'\]: got the value 95.0; pass fractions"),
        ({"a": np.full((2, 3, 3), -0.1)}, r"accuracy\['a'\]: got the value -0.1"),
    ],
)
@pytest.mark.parametrize("use", [report.check_accuracy, report.accuracy_matrices, report.accuracy_over_tasks])
def test_wrong_accuracy_raises_one_clear_error(use, wrong, message):
    with pytest.raises(ValueError, match=message):
        use(wrong)


# Plots


def test_matrices_show_means_over_seeds_on_one_scale(accuracy):
    accuracy["naive"][0, 0, 2] = np.nan  # one seed left: its value
    accuracy["naive"][:, 1, 2] = np.nan  # none left: an empty cell
    naive, joint, bar = report.accuracy_matrices(accuracy).axes
    expected = [[0.8, 0.2, 0.0], [0.5, 0.7, np.nan], [0.3, 0.6, 0.75]]
    np.testing.assert_allclose(naive.images[0].get_array().filled(np.nan), expected)
    np.testing.assert_allclose(joint.images[0].get_array(), [[0.9, 0.85, 0.8]])
    for axes in (naive, joint):
        assert axes.images[0].get_clim() == (0, 1)
        assert axes.get_xlabel() == "accuracy on task"
    assert [axes.get_title() for axes in (naive, joint)] == ["naive", "joint"]
    assert naive.get_ylabel() == "after training task"
    assert [label.get_text() for label in joint.get_yticklabels()] == ["all"]
    assert bar.get_ylim() == (0, 1)
    cells = {text.get_position(): text.get_text() for text in naive.texts}
    assert len(cells) == 8
    assert cells[(1, 1)] == "80"
    assert cells[(2, 3)] == "60"  # task 2 after stage 3
    assert (3, 2) not in cells
    light, dark = (text.get_color() for text in naive.texts[:3:2])
    assert (light, dark) == ("black", "white")  # on 80 % (light green) and on 0 % (dark violet)


def test_matrices_of_many_tasks_and_methods_have_no_numbers_and_stay_apart():
    accuracy = {f"m{k}": np.full((1, 12 if k else 1, 12), 0.5) for k in range(5)}
    figure = report.accuracy_matrices(accuracy)
    *maps, _ = figure.axes
    assert len(maps) == 5
    assert not any(axes.texts for axes in maps)
    boxes = [axes.get_position() for axes in figure.axes]
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1 and box.y1 <= 1 for box in boxes)


def test_lines_are_means_over_the_tasks_seen_and_over_seeds(accuracy):
    (axes,) = report.accuracy_over_tasks(accuracy).axes
    naive, joint = axes.lines
    np.testing.assert_array_equal(naive.get_xdata(), [1, 2, 3])
    # Seeds: 0.9, (0.5 + 0.8) / 2, (0.4 + 0.6 + 0.8) / 3 and 0.7, (0.5 + 0.6) / 2, (0.2 + 0.6 + 0.7) / 3.
    np.testing.assert_allclose(naive.get_ydata(), [(0.9 + 0.7) / 2, (0.65 + 0.55) / 2, (0.6 + 0.5) / 2])
    np.testing.assert_allclose(joint.get_ydata(), [0.85, 0.85, 0.85])
    assert (naive.get_linestyle(), joint.get_linestyle()) == ("-", "--")
    assert (naive.get_color(), joint.get_color()) == COLOURS[:2]
    assert axes.get_xlabel() == "tasks seen so far"
    labels = {text.get_text(): text for text in axes.texts}
    assert set(labels) == {"naive", "joint"}
    np.testing.assert_allclose(labels["naive"].xy, (3, 0.55))


def test_shade_is_the_95_percent_interval_over_seeds():
    values = np.asarray([0.50, 0.52]).reshape(2, 1, 1)
    (axes,) = report.accuracy_over_tasks({"naive": np.broadcast_to(values, (2, 3, 3))}).axes
    (shade,) = axes.collections
    heights = shade.get_paths()[0].vertices[:, 1]
    # t(0.975; 1) = 12.7062 times the standard error 0.01.
    np.testing.assert_allclose([heights.min(), heights.max()], [0.51 - 0.127062, 0.51 + 0.127062], atol=1e-6)


def test_one_seed_has_no_shade_and_a_single_task_is_a_point():
    (axes,) = report.accuracy_over_tasks({"naive": np.full((1, 1, 1), 0.6)}).axes
    assert not any(path.vertices.size for shade in axes.collections for path in shade.get_paths())
    (line,) = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1], [0.6])
    assert (line.get_linestyle(), line.get_marker()) == ("-", "o")


def test_undefined_means_leave_gaps_and_no_warning(accuracy):
    accuracy["naive"][0, 1, 0] = np.nan  # the other seed is left
    accuracy["naive"][:, 2, 0] = np.nan  # no seed is left: the line ends at stage 2
    accuracy["joint"][:] = np.nan
    figure = report.accuracy_over_tasks(accuracy)
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.8, 0.55, np.nan])
    (label,) = axes.texts
    np.testing.assert_allclose(label.xy, (2, 0.55))
    assert "naive" in report.to_svg(figure, "gaps")


def test_labels_keep_their_order_and_their_distance():
    heights = [0.99, 0.2, 0.98, 0.99, 0.0, 0.01]
    placed = _spread(heights, 0.05)
    assert np.diff(np.sort(placed)).min() >= 0.05 - 1e-12
    assert placed.min() >= 0
    assert placed.max() <= 1
    np.testing.assert_array_equal(np.argsort(placed), np.argsort(heights, kind="stable"))
    assert placed[1] == pytest.approx(0.2)
    np.testing.assert_allclose(_spread([0.5, 0.52], 0.1), [0.46, 0.56])  # both give way by the same


@pytest.mark.parametrize("name", ["a", "m" * 100])
def test_labels_of_any_length_fit_beside_axes_of_one_size(name):
    figure = report.accuracy_over_tasks({name: np.full((2, 3, 3), 0.5)})
    (axes,) = figure.axes
    assert axes.get_position().width * figure.get_figwidth() == pytest.approx(7.2)
    (label,) = axes.texts
    right = label.get_window_extent().x1 / figure.dpi
    assert figure.get_figwidth() - 0.2 < right < figure.get_figwidth()


def test_svg_is_repeatable_text_with_a_title(accuracy):
    first = report.to_svg(report.accuracy_over_tasks(accuracy), 'a "title" <1>')
    figure = report.accuracy_over_tasks(accuracy)
    assert report.to_svg(figure, 'a "title" <1>') == first
    assert report.to_svg(figure, 'a "title" <1>') == first  # drawing leaves the figure as it was
    name = "a &quot;title&quot; &lt;1&gt;"
    assert first.startswith(f'<svg role="img" aria-label="{name}"')
    assert f"<title>{name}</title>" in first
    assert re.search(r"<text[^>]*>tasks seen so far</text>", first)
    assert first.endswith("</svg>")


def test_missing_matplotlib_names_the_extra(accuracy, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "jaxcl\[experiments\]"'):
        report.accuracy_over_tasks(accuracy)


# Page


class Page(HTMLParser):
    """Checks that tags nest, and collects what the tests look at."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.cells, self.text = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.ids.extend([attributes["id"]] if "id" in attributes else [])
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@pytest.fixture(scope="module")
def page():
    accuracy = {HOSTILE: np.full((2, 3, 3), 0.5), "joint": np.full((2, 1, 3), 0.9)}
    figures = {"Matrices <of> all": report.accuracy_matrices(accuracy), "Lines": report.accuracy_over_tasks(accuracy)}
    return report.html_report(example_metrics(), figures)


def test_page_is_well_formed_and_complete(page):
    parsed = Page(page)
    assert not parsed.open
    names = [tag for tag, _ in parsed.tags]
    assert page.startswith("<!DOCTYPE html>")
    assert dict(parsed.tags)["html"] == {"lang": "en"}
    assert any(attributes.get("name") == "viewport" for tag, attributes in parsed.tags if tag == "meta")
    assert names.count("h1") == 1
    assert names.count("h2") == names.count("section") == 3
    assert names.count("svg") == names.count("figcaption") == 2
    assert names.count("details") == 1
    assert all("scope" in attributes for tag, attributes in parsed.tags if tag == "th")
    assert len(set(parsed.ids)) == len(parsed.ids) > 0
    referred = set(re.findall(r'(?:url\(#|href="#)([^")]+)', page))
    assert referred
    assert referred <= set(parsed.ids)
    text = "".join(parsed.text)
    assert (
        "Experiment digits, preset quick: 2 methods, 5 seeds, 3 min 12 s in all, "
        "on TPU v5e, TPU v5e with JAX 0.10.2 and Python 3.11.9."
    ) in text
    assert "Means over 5 seeds; ±" in text
    assert "bwt: final accuracy" in text
    assert "fwt" not in text


def test_page_shows_the_cells_of_the_table_and_the_settings(page, metrics):
    cells = [cell.replace("\xa0", " ") for cell in Page(page).cells]
    assert cells == [
        *(cell for row in report.results_rows(metrics["results"], metrics["costs"]) for cell in row),
        "setting", "value", "seeds", "0, 1", "note", "a<b", "dkvb.codebooks", "64", "dkvb.extra", "{}", "limit", "null",
    ]  # fmt: skip
    assert cells[5:10] == ["naive", "41.2 ± 1.4", "-70.0 ± 2.0", "358 kB", "3.2"]


def test_page_refers_to_nothing_outside(page):
    outside = re.sub(r'xmlns(:\w+)?="http://www\.w3\.org/[^"]*"', "", page)
    assert outside != page
    assert "http" not in outside
    assert "//" not in re.sub(r"base64,[^\"]*", "", outside)
    assert "@import" not in page
    for tag, attributes in Page(page).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        assert "src" not in attributes
        assert attributes.get("xlink:href", "#").startswith(("#", "data:image/png;base64,"))


def test_page_escapes_every_text(page):
    assert "<script" not in page
    assert "<of>" not in page
    assert "a<b" not in page
    assert HOSTILE in Page(page).cells
    # In the table, as a map's title and as a line's label, with its dollars as they are and no mathematics.
    assert "".join(Page(page).text).count(HOSTILE) == 3


def test_page_without_figures_or_keys(metrics):
    page = report.html_report(metrics, {})
    assert "<svg" not in page
    assert "<h2>Figures" not in page
    del metrics["seconds"], metrics["costs"]
    with pytest.raises(ValueError, match="metrics: got no 'costs', 'seconds'; pass a document with experiment"):
        report.html_report(metrics, {})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.26, "0.3 s"), (59.4, "59.4 s"), (60, "1 min 0 s"), (3599.7, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_page_tells_the_time_in_words(metrics, seconds, text):
    assert f", {text} in all," in report.html_report({**metrics, "seconds": seconds}, {})


def test_curves_are_drawn_as_given():
    curves = {"vq": np.array([[1, 2, 3], [0.5, np.nan, 2.0]]), "simvq": np.array([[1, 2], [3.0, 4.0]])}
    figure = report.line_plot(curves, "training step", "codes in use, %")
    (axes,) = figure.axes
    for line, curve in zip(axes.lines, curves.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata().T, curve)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "codes in use, %")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["vq", "simvq"]


def test_curves_begin_at_zero_unless_they_go_below():
    above, below = np.array([[1, 2], [0.5, 2.0]]), np.array([[1, 2], [-0.1, np.nan]])
    for curves, lowest in (({"a": above}, 0), ({"a": above, "b": below}, -0.1), ({"b": below}, -0.1)):
        low, high = report.line_plot(curves, "bits", "bits").axes[0].get_ylim()
        assert low < high and (low == 0 if lowest == 0 else low <= lowest)


@pytest.mark.parametrize("curves", [{}, {"a": np.zeros(3)}])
def test_what_is_no_curve_is_named(curves):
    with pytest.raises(ValueError, match="curves: got "):
        report.line_plot(curves, "x", "y")


# Heat maps


def test_a_heat_map_shows_its_values():
    values = np.array([[4.0, 0.25, 1], [0.25, 2, 0]])
    figure = report.heat_map(values, "ranks", names=["first", "second"], most=4)
    axes, colours = figure.axes
    np.testing.assert_array_equal(axes.images[0].get_array(), values)
    assert axes.images[0].get_clim() == (0, 4)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["first", "second"]
    assert colours.get_ylabel() == "ranks"
    assert report.heat_map(values, "cosine").axes[0].get_ylabel() == "task"


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: report.heat_map(np.ones(3), "x"), "values: got shape"),
        (
            lambda: report.heat_map(np.ones((2, 3)), "x", names=["a"]),
            r"names: got \['a'\]; pass one for each of 2 rows",
        ),
    ],
)
def test_a_heat_map_that_cannot_be_drawn_is_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
