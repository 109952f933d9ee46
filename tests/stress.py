"""How often a promise was tried and how often it failed; `make stress` prints the table."""

from __future__ import annotations

from dataclasses import dataclass, field

TALLIES: list[Tally] = []


@dataclass
class Tally:
    """The tries of one promise."""

    promise: str
    tried: int = 0
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        TALLIES.append(self)

    def count(self, right: bool, what: str) -> None:
        """One try more."""
        self.tried += 1
        if not right:
            self.failed.append(what)

    def finish(self) -> None:
        assert self.tried
        assert not self.failed, self.failed


def table() -> list[str]:
    """Lines of Markdown."""
    lines = ["| promise | tried | failed |", "|---|---|---|"]
    return lines + [f"| {tally.promise} | {tally.tried} | {len(tally.failed)} |" for tally in TALLIES]
