"""Pages made while the site is built (a MkDocs hook): the metrics, and the pages of the repository's root.

Nothing is committed twice. Needs neither torch nor transformers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from selfdistill.runtime import METRICS

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")

METRICS_PAGE = """# Metrics

`metrics.jsonl` in a run folder has one object per step, with these keys. A key is missing if it does not apply to the
run or to the step. [Measuring](measuring.md#during-training) describes what else is measured during training, and the
[glossary](glossary.md) the words.

| key | meaning, unit |
|---|---|
{rows}
"""


def pages() -> dict[str, str]:
    """Markdown of every page, by its path in the site."""
    rows = "\n".join(f"| `{key}` | {_cell(text)} |" for key, text in METRICS.items())
    found = {"metrics.md": METRICS_PAGE.format(rows=rows)}
    return found | {name.lower(): root_page((ROOT / name).read_text(encoding="utf-8")) for name in ROOT_PAGES}


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def root_page(text: str) -> str:
    """A page of the root as it stands in the site: links to pages lead there, those to code become plain text."""

    def link(found: re.Match[str]) -> str:
        words, path, anchor = found.groups()
        if path in ROOT_PAGES:
            return f"[{words}]({path.lower()}{anchor})"
        if not path or path.startswith("docs/"):
            return f"[{words}]({path.removeprefix('docs/')}{anchor})"
        return words

    return re.sub(r"\[([^\[\]]+)\]\((?!http)([^()#]*)(#[^()]*|)\)", link, text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs: add the pages to the site."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files
