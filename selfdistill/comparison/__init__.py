"""Compare several runs."""

from selfdistill.comparison.compare import compare
from selfdistill.comparison.report import report

__all__ = ["compare", "report"]
