"""One self-contained HTML page for a run: its table, its figures and its configuration."""

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from jaxcl.report.plots import to_svg
from jaxcl.report.tables import Results, legend, results_rows, seeds
from jaxcl.typing import bad_argument

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEYS = ("experiment", "preset", "config", "results", "environment", "seconds")

MEANINGS = {
    "acc": "mean accuracy over all tasks after the last one",
    "forgetting": "best earlier accuracy on a task less the final one",
    "bwt": "final accuracy on a task less that right after learning it",
    "fwt": "accuracy on a task right before learning it less that of the untrained model",
    "learning accuracy": "accuracy on a task right after learning it",
}

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d2127; --soft: #5b6470; --line: #dfe3e8; --stripe: #f6f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --ink: #e4e7eb; --soft: #9aa4b0; --line: #333a43; --stripe: #1b1f25 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 1100px; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: clamp(1.4rem, 5vw, 1.9rem); line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem }
p { max-width: 46rem; margin: 0 }
figcaption, .note { color: var(--soft); font-size: .9rem; margin: .5rem 0; max-width: none }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th:first-child { text-align: left; position: sticky; left: 0; background: inherit }
tr { background: var(--page) }
thead th { border-bottom-width: 2px; font-size: .9rem; white-space: normal; vertical-align: bottom }
tbody tr:nth-child(even) { background: var(--stripe) }
.wide { width: 100% }
figure { margin: 0 0 1.75rem }
figure .scroll { background: #ffffff; border: 1px solid var(--line); border-radius: 8px; padding: .75rem }
figure svg { display: block; margin: 0 auto; max-width: 100%; min-width: 40rem; height: auto }
summary { cursor: pointer; margin-bottom: .5rem }
details :is(th, td) { text-align: left; white-space: normal; overflow-wrap: anywhere }
details th { font-weight: normal; color: var(--soft) }
"""


def html_report(metrics: Mapping[str, Any], figures: Mapping[str, "Figure"]) -> str:
    """One HTML page that needs no other file: summary, table of results, figures, configuration.

    Args:
        metrics: the document of metrics.json: {"experiment", "preset", "config", "results", "environment": {"jax",
            "python", "devices"}, "seconds"}; `results` as for `jaxcl.report.results_rows`.
        figures: a matplotlib figure for each caption; may be empty.

    Raises:
        ValueError: `metrics` lacks one of its keys, or its results are empty.
    """
    missing = [key for key in KEYS if key not in metrics]
    if missing:
        raise bad_argument("metrics", f"no {', '.join(map(repr, missing))}", f"pass a document with {', '.join(KEYS)}")
    title = escape(f"{metrics['experiment']}: {metrics['preset']}")
    sections = {"Results": _results(metrics["results"])}
    if figures:
        sections["Figures"] = "\n".join(_figure(caption, figure) for caption, figure in figures.items())
    sections["Configuration"] = _configuration(metrics["config"])
    body = "\n".join(f"<section>\n<h2>{heading}</h2>\n{content}\n</section>" for heading, content in sections.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{escape(_summary(metrics))}</p>
{body}
</main>
</body>
</html>
"""


def _summary(metrics: Mapping[str, Any]) -> str:
    results, environment = metrics["results"], metrics["environment"]
    methods = f"{len(results)} method{'s' * (len(results) != 1)}"
    return (
        f"Experiment {metrics['experiment']}, preset {metrics['preset']}: {methods}, {seeds(results)}, "
        f"{_duration(metrics['seconds'])} in all, on {_text(environment['devices'])} "
        f"with JAX {environment['jax']} and Python {environment['python']}."
    )


def _results(results: Results) -> str:
    headings, *rows = results_rows(results)
    head = "".join(f'<th scope="col">{escape(heading).replace(" %", "&nbsp;%")}</th>' for heading in headings)
    body = "\n".join(
        f'<tr><th scope="row">{escape(method)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for method, *cells in rows
    )
    meanings = [f"{metric}: {text}" for metric, text in MEANINGS.items() if f"{metric} %" in headings]
    notes = f'\n<p class="note">{escape("; ".join(meanings))}.</p>' if meanings else ""
    return f"""<p class="note">{escape(legend(results))}</p>
<div class="scroll" role="region" aria-label="Table of results" tabindex="0">
<table class="wide">
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>{notes}"""


def _figure(caption: str, figure: "Figure") -> str:
    return f"""<figure>
<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">{to_svg(figure, caption)}</div>
<figcaption>{escape(caption)}</figcaption>
</figure>"""


def _configuration(config: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in _flat(config, "")
    )
    return f"""<details>
<summary>All settings of this run</summary>
<div class="scroll">
<table>
<thead><tr><th scope="col">setting</th><th scope="col">value</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
</details>"""


def _flat(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """The settings as (name, text); nested ones with dotted names."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(value)


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
