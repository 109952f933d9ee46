"""Compare several runs."""

from selfdistill.comparison.compare import compare
from selfdistill.comparison.compare_result import CompareResult
from selfdistill.comparison.report import report
from selfdistill.comparison.text_plot import scatter

__all__ = ["CompareResult", "compare", "report", "scatter"]
