"""Tables, plots and files of a run, and one self-contained HTML page that shows them.

matplotlib (``pip install "jaxcl[experiments]"``) is needed for the plots only.
"""

from jaxcl.report.files import write_accuracy_csv, write_atomic, write_json
from jaxcl.report.page import html_report
from jaxcl.report.plots import accuracy_matrices, accuracy_over_tasks, to_svg
from jaxcl.report.tables import check_accuracy, results_rows, results_table

__all__ = [
    "accuracy_matrices",
    "accuracy_over_tasks",
    "check_accuracy",
    "html_report",
    "results_rows",
    "results_table",
    "to_svg",
    "write_accuracy_csv",
    "write_atomic",
    "write_json",
]
