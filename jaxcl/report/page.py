"""Self-contained HTML pages: the parts they are made of, and the page of a run."""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from jaxcl.report.plots import to_svg
from jaxcl.report.tables import Results, check_metrics, legend, results_rows, seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANINGS = {
    "acc": "mean accuracy over all tasks after the last one",
    "forgetting": "best earlier accuracy on a task less the final one",
    "bwt": "final accuracy on a task less that right after learning it",
    "fwt": "accuracy on a task right before learning it less that of the untrained model",
    "learning accuracy": "accuracy on a task right after learning it",
    "utilisation": "codes chosen at least once over one pass of the training set",
    "perplexity": "exp of the entropy of how often each code is chosen there",
    "kept accuracy": "accuracy on reconstructions of a classifier trained on originals, over that on originals",
    "examples/s": "examples trained on in a second",
    "peak memory": "the most memory that the process had held by then",
}

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d2127; --soft: #5b6470; --line: #dfe3e8; --stripe: #f6f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --ink: #e4e7eb; --soft: #9aa4b0; --line: #333a43; --stripe: #1b1f25 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: clamp(1.4rem, 5vw, 1.9rem); line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem }
p { max-width: 46rem; margin: 0 }
figcaption, .note { color: var(--soft); font-size: .9rem; margin: .5rem 0; max-width: none }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th:first-child { position: sticky; left: 0; background: inherit }
.name, .text :is(th, td) { text-align: left }
tr { background: var(--page) }
thead th { border-bottom-width: 2px; font-size: .9rem; white-space: normal; vertical-align: bottom }
tbody tr:nth-child(even) { background: var(--stripe) }
.wide { width: 100% }
figure { margin: 0 0 1.75rem }
figure .scroll { background: #ffffff; border: 1px solid var(--line); border-radius: 8px; padding: .75rem }
figure svg { display: block; margin: 0 auto; max-width: 100%; min-width: 40rem; height: auto }
summary { cursor: pointer; margin-bottom: .5rem }
.text td { white-space: normal; overflow-wrap: anywhere; min-width: 8rem }
.text tbody th { font-weight: normal; color: var(--soft) }
"""


def html_report(metrics: Mapping[str, Any], figures: Mapping[str, "Figure"]) -> str:
    """One HTML page that needs no other file: summary, table of results and costs, figures, configuration.

    Args:
        metrics: the document of metrics.json: {"experiment", "preset", "config", "results", "costs", "environment":
            {"jax", "python", "devices"}, "seconds"}; `results` and `costs` as for `jaxcl.report.results_rows`.
        figures: a matplotlib figure for each caption; may be empty.

    Raises:
        ValueError: `metrics` lacks one of its keys, or its results are empty.
    """
    check_metrics(metrics)
    sections = {"Results": results_section(metrics["results"], results_rows(metrics["results"], metrics["costs"]))}
    if figures:
        sections["Figures"] = figures_section(figures)
    settings = [["setting", "value"], *map(list, flat_settings(metrics["config"]))]
    sections["Configuration"] = f"""<details>
<summary>All settings of this run</summary>
{html_table(settings, "All settings of this run", kind="text")}
</details>"""
    return html_page(f"{metrics['experiment']}: {metrics['preset']}", _summary(metrics), sections)


def html_page(title: str, summary: str, sections: Mapping[str, str]) -> str:
    """One HTML page that needs no other file.

    Args:
        title: plain text.
        summary: plain text below the title.
        sections: {heading, plain text: content, HTML}.
    """
    body = "\n".join(
        f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>" for heading, content in sections.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p>{escape(summary)}</p>
{body}
</main>
</body>
</html>
"""


def html_table(
    rows: Sequence[Sequence[str]], label: str, *, names: int = 1, kind: Literal["wide", "text"] = "wide"
) -> str:
    """Rows of cells, plain text, the first of them headings, as an HTML table that scrolls where it is too wide.

    Args:
        rows: all of one length.
        label: what a screen reader says.
        names: how many columns, the first ones, name the row.
        kind: "wide" for numbers, which stand right in a table of the page's width; "text" for text, which wraps.
    """
    headings, *body = rows
    head = "".join(f'<th scope="col" class="name">{escape(heading)}</th>' for heading in headings[:names])
    head += "".join(f'<th scope="col">{escape(heading).replace(" %", "&nbsp;%")}</th>' for heading in headings[names:])
    lines = "\n".join(
        "<tr>"
        + "".join(f'<th scope="row" class="name">{escape(cell)}</th>' for cell in row[:names])
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[names:])
        + "</tr>"
        for row in body
    )
    return f"""<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">
<table class="{kind}">
<thead><tr>{head}</tr></thead>
<tbody>
{lines}
</tbody>
</table>
</div>"""


def html_note(text: str) -> str:
    """A paragraph of small print, from plain text."""
    return f'<p class="note">{escape(text)}</p>'


def results_section(results: Results, rows: Sequence[Sequence[str]], *, names: int = 1) -> str:
    """The HTML of a table of results, with what its numbers are above it and what its headings mean below.

    Args:
        results: as for `jaxcl.report.results_rows`.
        rows: what `jaxcl.report.results_rows` makes of them; may have further columns of names.
        names: how many columns of names there are, the first ones.
    """
    meanings = [f"{metric}: {text}" for metric, text in MEANINGS.items() if {metric, f"{metric} %"} & {*rows[0]}]
    notes = [html_note("; ".join(meanings) + ".")] if meanings else []
    return "\n".join([html_note(legend(results)), html_table(rows, "Table of results", names=names), *notes])


def figures_section(figures: Mapping[str, "Figure"]) -> str:
    """The HTML of figures, each over its caption."""
    return "\n".join(_figure(caption, figure) for caption, figure in figures.items())


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings as (name, text); nested ones with dotted names."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(value)


def _summary(metrics: Mapping[str, Any]) -> str:
    results, environment = metrics["results"], metrics["environment"]
    methods = f"{len(results)} method{'s' * (len(results) != 1)}"
    return (
        f"Experiment {metrics['experiment']}, preset {metrics['preset']}: {methods}, {seeds(results)}, "
        f"{_duration(metrics['seconds'])} in all, on {_text(environment['devices'])} "
        f"with JAX {environment['jax']} and Python {environment['python']}."
    )


def _figure(caption: str, figure: "Figure") -> str:
    return f"""<figure>
<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">{to_svg(figure, caption)}</div>
<figcaption>{escape(caption)}</figcaption>
</figure>"""


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
