"""The result of a comparison: its table, its figure and its conclusion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from selfdistill.comparison.conclusions import assumption
from selfdistill.comparison.run_folders import curve_name
from selfdistill.errors import number_of
from selfdistill.runtime import Printable, result_table
from selfdistill.training import Run


@dataclass(frozen=True, repr=False)
class CompareResult(Printable):
    """The results of several runs side by side."""

    output_dir: Path
    details: dict[str, Any]
    """The content of ``comparison.json``."""

    @property
    def conclusion(self) -> str:
        """The conclusion as text."""
        return str(self.details["sentence"])

    @property
    def table(self) -> list[dict[str, Any]]:
        """One entry per method, learning rate and evaluated step: means over seeds with their intervals."""
        return list(self.details["table"])

    @property
    def runs(self) -> list[Run]:
        """The runs, in the order of ``details["runs"]``."""
        return [Run(self.output_dir / run["folder"]) for run in self.details["runs"]]

    @property
    def all_failed(self) -> bool:
        """Whether all runs failed."""
        return all(run["failed"] for run in self.details["runs"])

    def figure(self) -> str:
        """The trade-off between the new task and prior abilities, as SVG."""
        file = self.output_dir / "trade_off.svg"
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def print(self, console: Console) -> None:
        """Print a table of the methods, then the conclusion."""
        _print(self.details, console)


def _print(result: dict[str, Any], console: Console) -> None:
    title = f"{result['data']}, evaluated on {result['base']['items']} items of {result['test']}"
    shown = result_table("", "steps", "seeds", "new task", "prior", "KL", "minutes", title=title)
    base = result["base"]
    prior = f"{base['prior_accuracy']:.3f}" if "prior_accuracy" in base else ""
    shown.add_row("base", "0", "", f"{base['accuracy']:.3f}", prior, "0", "")
    for name, key in (("teacher", "teacher"), ("oracle RAG", "rag")):
        if result[key]:
            items = result[key]["items"]  # fewer if rows are too long with what it is shown
            on = "" if items == base["items"] else f", {number_of(items, 'item')}"
            shown.add_row(f"{name}{on}", "", "", f"{result[key]['accuracy']:.3f}", "", "", "")
    for row in result["table"]:
        cells = [_cell(row["accuracy"]), _cell(row["prior_accuracy"]), _cell(row["kl_base"], digits=3)]
        shown.add_row(
            escape(curve_name(row)), str(row["steps"]), str(row["seeds"]), *cells, f"{row['seconds'] / 60:.1f}"
        )
    console.print(shown)
    console.print(
        "KL: KL(base||model) on general prompts, nats per token. In parentheses: 95% intervals over seeds.",
        highlight=False,
    )
    console.print(result["sentence"], highlight=False, markup=False)
    if "moved" in result:
        console.print(assumption(result["teacher"], result["moved"]), highlight=False, markup=False)


def _cell(value: tuple[float, float | None, float | None] | None, *, digits: int = 2) -> str:
    """The value and, with ``digits`` decimals, its interval."""
    if value is None:
        return ""
    middle, low, high = value
    return f"{middle:.3f}" + ("" if low is None or low == high else f" ({low:.{digits}f}, {high:.{digits}f})")
