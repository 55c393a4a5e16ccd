"""Tables, plots and files of runs, self-contained HTML pages that show them, and TensorBoard's event files.

matplotlib and tensorboardX (``pip install "jaxcl[experiments]"``) are needed for plots and for TensorBoard only.
"""

from jaxcl.report.files import read_accuracy_csv, read_json, write_accuracy_csv, write_json
from jaxcl.report.keys import distance_histograms, key_utilisation, keys_among_heads, keys_by_class
from jaxcl.report.masks import weight_usage_bars
from jaxcl.report.page import (
    figures_section,
    flat_settings,
    html_note,
    html_page,
    html_report,
    html_table,
    results_section,
)
from jaxcl.report.plots import (
    accuracy_against,
    accuracy_bars,
    accuracy_matrices,
    accuracy_over_tasks,
    heat_map,
    line_plot,
    to_svg,
)
from jaxcl.report.tables import check_accuracy, check_metrics, legend, results_rows, results_table, text_table
from jaxcl.report.tensorboard import TensorBoard
from jaxcl.report.tokens import image_rows

__all__ = [
    "TensorBoard",
    "accuracy_against",
    "accuracy_bars",
    "accuracy_matrices",
    "accuracy_over_tasks",
    "check_accuracy",
    "check_metrics",
    "distance_histograms",
    "figures_section",
    "flat_settings",
    "heat_map",
    "html_note",
    "html_page",
    "html_report",
    "html_table",
    "image_rows",
    "key_utilisation",
    "keys_among_heads",
    "keys_by_class",
    "legend",
    "line_plot",
    "read_accuracy_csv",
    "read_json",
    "results_rows",
    "results_section",
    "results_table",
    "text_table",
    "to_svg",
    "weight_usage_bars",
    "write_accuracy_csv",
    "write_json",
]
