"""One self-contained HTML page, with the same numbers as JSON, CSV and PNG beside it."""

from laco.report.data import Example, Insertion, Results, Row, Shown, StageTimes
from laco.report.page import write_report

__all__ = ["Example", "Insertion", "Results", "Row", "Shown", "StageTimes", "write_report"]
