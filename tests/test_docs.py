"""The documentation is executed: every page's files, commands and Python in order, with a tiny model in place of the
starter model, two steps in place of many, and the first rows of the package's training data. Commands that need a
network or devices are parsed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ENDS
from picture_models import FAMILIES

import selfdistill as sd
from selfdistill.cli import main
from selfdistill.cli_parser import COMMANDS, SWITCHES, parse
from selfdistill.config import TrainConfig
from selfdistill.data.contexts import CONTEXTS, ONE_DEMONSTRATION, parse_context
from selfdistill.data.demonstrations import COLUMNS, SCORER_NAMES
from selfdistill.data.sources import packaged
from selfdistill.methods import METHODS, own_names, uses
from selfdistill.runtime import METRICS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in DOCS.rglob("*.md")}
for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"):
    PAGES[name] = (ROOT / name).read_text(encoding="utf-8")
README = PAGES["README.md"]
STARTER = "smollm2-135m"
IMAGE_TEXT = "Qwen/Qwen2.5-VL-3B-Instruct"
"""The model of commands with pictures; a tiny Idefics3 takes its place."""
MOST_WORDS = 700
FIRST_ROWS = 8
"""Of the package's training data; ``--scorer code`` runs the tests of every row in a process of its own."""
REFUSED = {"check": 4, "learn add": 4}
"""Exit codes of a random model, which teaches nothing: ``check`` advises against it, ``learn`` does not accept it."""


@dataclass(frozen=True)
class Block:
    """One fenced block: ``python`` and ``sh`` run, ``console`` is parsed, one with a title is a file."""

    language: str
    title: str | None
    text: str


def blocks(page: str) -> list[Block]:
    found = re.findall(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', PAGES[page], re.DOTALL | re.MULTILINE)
    return [Block(language, title or None, text) for language, title, text in found]


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ ")) for line in lines if line.strip()]


def with_code(*languages: str) -> list[str]:
    return sorted(page for page in PAGES if any(block.language in languages for block in blocks(page)))


def with_first_rows(found: re.Match[str]) -> str:
    rows = Path(packaged(found[1])).read_text(encoding="utf-8").splitlines(keepends=True)
    Path(found[1]).write_text("".join(rows[:FIRST_ROWS]), encoding="utf-8")
    return found[1]


def shortened(text: str, models: dict[str, str]) -> str:
    """What to run in place of a block; writes the data that it reads."""
    for name, folder in models.items():
        text = text.replace(name, folder)
    text = re.sub(r"bundled:(\w+\.train\.jsonl)", with_first_rows, text)
    text = re.sub(r"((?:max|eval)_steps[= ])\d+", r"\g<1>2", text)
    return text.replace("--seeds 0,1 ", "--seeds 0 ").replace("seeds=(0, 1)", "seeds=(0,)")


@pytest.mark.parametrize("page", with_code("sh", "python"))
def test_a_page_does_what_it_says(
    page: str,
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    models = {STARTER: str(model_folder(ends=ENDS, room=4096, layers=1))}
    if IMAGE_TEXT in PAGES[page]:
        models[IMAGE_TEXT] = str(tmp_path / "image-text")
        next(family for family in FAMILIES if family.name == "idefics3").write(tmp_path / "image-text")
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(shortened(block.text, models), page, "exec"), names)
        elif block.language == "sh":
            for words in commands(shortened(block.text, models)):
                assert words[0] == "selfdistill"
                what = "learn add" if words[1] == "learn" and "add" in words else words[1]
                assert main(words[1:]) == REFUSED.get(what, 0), (words, capsys.readouterr().err)
    if page == "README.md":
        assert isinstance(names["run"], sd.Run)
        assert names["result"].items == len(names["test_rows"]) == 4
        assert names["checked"].best.context.startswith(tuple(CONTEXTS))
        assert Path("runs/shell/final/model.safetensors").is_file()


@pytest.mark.parametrize("page", with_code("console"))
def test_commands_that_are_only_shown_can_be_parsed(page: str) -> None:
    for block in blocks(page):
        for words in commands(block.text) if block.language == "console" else ():
            command, given = parse(words[words.index("selfdistill") + 1 :])
            settings = {key: value for key, value in given.items() if key not in (*SWITCHES, "json")}
            assert COMMANDS[command][0](**settings)


def test_every_block_is_of_a_known_kind() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("python", "sh", "json", "console", "text", ""), page
            if block.language in ("json",):
                assert block.title, page
                assert all(json.loads(line) for line in block.text.splitlines())


def inline_code() -> Iterator[tuple[str, str]]:
    for page, text in PAGES.items():
        for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)):
            yield page, code


def test_options_that_are_named_exist() -> None:
    known = {key for kind, _ in COMMANDS.values() for key in kind.model_fields} | {*SWITCHES, "config", "json", "help"}
    others = {"multi_gpu", "num_processes", "group-delay", "output-dir", "dist", "no-deps"}
    others |= {"max-lora-rank", "enable-auto-tool-choice", "tool-call-parser"}  # of vLLM
    found = {(page, option) for page, code in inline_code() for option in re.findall(r"--([a-z][\w-]*)", code)}
    guide = {(page, option) for page, option in found if page.startswith("docs/") or page == "README.md"}
    assert {(page, option) for page, option in guide if option not in known | others} == set()


# --- README ---


def test_the_readme_is_short_and_plain() -> None:
    assert len(README.split()) <= MOST_WORDS
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^(#|!\[).*$", "", prose, flags=re.MULTILINE)
    prose = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    sentences = [s.split() for s in re.split(r"(?<=[.:])\s+(?=[A-Z`])|\n\n|\n- ", prose) if len(s.split()) > 2]
    assert len(sentences) > 20
    assert max(map(len, sentences)) <= 30
    assert sum(map(len, sentences)) / len(sentences) < 18


def test_the_two_commands_are_make_targets_that_set_up_first() -> None:
    targets = re.findall(r"^make (\S+)$", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        done = subprocess.run(
            ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "pip install" in done.stdout
        assert {"demo": "selfdistill demo", "test": "pytest"}[target] in done.stdout


def test_the_caption_says_what_was_measured() -> None:
    """The percentages under the figure of the results' first page, from the comparison that drew it."""
    kept = json.loads((DOCS / "comparisons" / "facts.json").read_text(encoding="utf-8"))
    last = [run["evaluations"][-1] for run in kept["runs"] if run["method"] == "sdft"]
    shares = [sum(found[key] for found in last) / len(last) for key in ("accuracy", "prior_accuracy")]
    numbers = [round(100 * share) for share in shares]
    assert numbers == [80, 71]
    text = " ".join(PAGES["docs/results.md"].split())
    assert "SDFT ends at 80% of the facts" in text
    assert "71% of the prior questions" in text
    assert "sft 0.545, the base 0.878" in " ".join(PAGES["docs/results_paper.md"].replace("\n> ", " ").split())


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_pages_figures_are_those_of_the_study(page: str) -> None:
    lines = (DOCS / "comparisons" / "studies" / "routing.jsonl").read_text(encoding="utf-8").splitlines()
    kept: dict[str, list[str]] = {}
    for line in map(json.loads, lines):
        kept.setdefault(line["arm"], []).append(f"{line['evaluations'][-1]['prior_accuracy']:.0%}")
        if line["arm"] == "sft":
            kept.setdefault("base", []).append(f"{line['evaluations'][0]['prior_accuracy']:.0%}")
    half = ("sft+1/2", "sdft+1/2", "sft+narrow", "sdft+narrow")
    anchored = [share for arm in half for share in kept[arm]]
    base, sft, sdft, least = (span(shares) for shares in (kept["base"], kept["sft"], kept["sdft"], anchored))
    text = " ".join(PAGES[page].split())
    assert len(kept["sft"]) == len(kept["sdft"]) == 3
    shares = f"The base answers {base} correctly, SFT models {sft}, SDFT models {sdft} (mean over kinds, three seeds)."
    assert shares in text
    assert f"With anchors, {least} are right" in text


def span(shares: list[str]) -> str:
    """Smallest and largest, as in 42 to 51%."""
    low, high = min(shares), max(shares)
    return high if low == high else f"{low[:-1]} to {high}"


# --- tables ---


def first_cells(page: str, heading: str) -> list[str]:
    """What stands in backticks at the start of each row of the first table under a heading."""
    section = f"\n{PAGES[page]}".split(f"\n{heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None
    rows = "\n".join(table[0].splitlines()[2:])
    return re.findall(r"^\| (`.*?`(?:, `.*?`)*) \|", rows, re.MULTILINE)


def test_tables_name_what_there_is() -> None:
    contexts = [cell.strip("`") for cell in first_cells("docs/contexts.md", "## Contexts")]
    assert [spec.partition(":")[0] for spec in contexts] == list(CONTEXTS)
    for spec in contexts:
        assert spec.startswith("template") or parse_context(spec)
    named = re.findall(r"The context must be ([^;]*);", PAGES["docs/contexts.md"])
    assert [re.findall(r"`(\w+)`", names) for names in named] == [ONE_DEMONSTRATION]
    columns = re.findall(r"`(\w+)`", " ".join(first_cells("docs/data.md", "## Columns")))
    assert columns == list(COLUMNS)
    scorers = [cell.strip("`") for cell in first_cells("docs/data.md", "## Scorers")]
    assert scorers == [*SCORER_NAMES, "code", "judge", "python:module.function"]
    methods = [cell.strip("`") for cell in first_cells("docs/methods.md", "## Formulas and cost of every method")]
    assert sorted(methods) == sorted([*METHODS, "merge"])  # a command that takes a method's place
    advised = PAGES["docs/methods.md"].split("## Which method?")[1].split("\n\n")[1]
    assert set(METHODS) <= set(re.findall(r"`(\w+)`", advised))
    settings = re.findall(r"`([\w]+)`", " ".join(first_cells("docs/methods.md", "## Settings of the loss")))
    assert set(settings) <= set(TrainConfig.model_fields)


def test_the_settings_of_each_method_are_those_that_it_reads() -> None:
    section = PAGES["docs/methods.md"].split("\n## Settings of each method\n")[1].split("\n## ")[0]
    lines = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `") and "--" not in line]
    rows = {name.strip(" `"): [re.findall(r"`(\w+)`", cell) for cell in cells] for name, *cells in lines}
    assert set(METHODS) - set(rows) == {"sft", "dft", "cpt"}
    for name, (options, own) in rows.items():
        other = {"teacher_model": "other"} if "teacher_model" in options else {}
        config = TrainConfig(model="m", data="d", output_dir="o", method=name, context="turns", **other)
        assert all(uses(config, option) for option in options), name
        assert sorted(own) == sorted(own_names(name)), name


def test_the_components_are_those_of_the_package() -> None:
    packages = sorted(folder.name for folder in (ROOT / "selfdistill").iterdir() if (folder / "__init__.py").is_file())
    cells = [cell.strip("`").rstrip("/") for cell in first_cells("docs/design.md", "## Components")]
    assert sorted(cell for cell in cells if "." not in cell) == packages


def test_every_module_is_in_the_table_of_where_to_look() -> None:
    """Once; a name without a folder is at the top, and a file of a method is not named."""
    rows = PAGES["docs/design.md"].split("\n## Where to look\n")[1].split("\n## ")[0].split("|---|---|\n")[1]
    named = []
    for cell in re.findall(r"^\| .* \| (.*) \|$", rows, re.MULTILINE):
        folder = ""
        for name in re.findall(r"`([^`]+)`", cell):
            folder = name if name.endswith("/") else folder
            named += [f"{folder}{name}"] if name != folder else []
    package = ROOT / "selfdistill"
    files = [file.relative_to(package).with_suffix("").as_posix() for file in package.rglob("*.py")]
    modules = [file for file in files if not file.endswith("__")] + ["data/bundled"]
    assert sorted(named) == sorted(set(modules) - {f"methods/{name}" for name in METHODS})


# --- links and the site ---


def generated(*hooks: str) -> dict[str, str]:
    """The pages that these hooks make, by default all."""
    found: dict[str, str] = {}
    for hook in hooks or ("gen_commands", "gen_pages"):
        found |= hook_of(hook).pages()
    return found


def hook_of(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_lead_to_files() -> None:
    """Of the checkout; only the pages of the API, which need the site too, may link to pages that it generates."""
    made = {DOCS / path for path in generated()}
    for page, text in PAGES.items():
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            target = ((ROOT / page).parent / link).resolve()
            assert target.exists() or (target in made and page.startswith("docs/api/")), f"{page}: {link}"


def test_the_site_has_every_page() -> None:
    def files(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [file for part in (entry.values() if isinstance(entry, dict) else entry) for file in files(part)]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]
    assert sorted(files(nav)) == sorted([*pages, *generated()])


def test_the_command_reference_has_every_option() -> None:
    pages = generated("gen_commands")
    assert list(pages) == ["commands/index.md", *(f"commands/{name}.md" for name in COMMANDS)]
    for name, (kind, text) in COMMANDS.items():
        page = pages[f"commands/{name}.md"]
        assert text in page
        shown = re.findall(r"^\| (?:`-\w`, )?`-{0,2}(\w+)`(?:<br>.*?)? \|", page, re.MULTILINE)
        others = {"config", *(switch for switch, wanted in SWITCHES.items() if name in wanted)}
        assert sorted(shown) == sorted({*kind.model_fields, *others, *(["json"] if name != "train" else [])})
    assert "| `--max_completion_length`<br>`256` |" in pages["commands/train.md"]
    assert "`forward_kl`, `reverse_kl`, `jsd`" in pages["commands/train.md"]


def test_the_page_of_metrics_has_every_key() -> None:
    page = generated("gen_pages")["metrics.md"]
    assert re.findall(r"^\| `(\S+)` \| \S", page, re.MULTILINE) == list(METRICS)
    assert "| `kl/forward` | KL(teacher\\|\\|student), nats per token over the retained tokens |" in page


def test_a_page_of_the_root_links_to_pages_of_the_site() -> None:
    text = "[a](docs/gpu.md#x) and [b](selfdistill/api.py), [c](SECURITY.md), [d](#here), [e](https://f.org)"
    shown = hook_of("gen_pages").root_page(text)
    assert shown == "[a](gpu.md#x) and b, [c](security.md), [d](#here), [e](https://f.org)"


def test_the_api_pages_have_every_public_name() -> None:
    text = "".join(PAGES[f"docs/api/{name}.md"] for name in ("index", "results", "slots"))
    assert [name for name in sd.__all__ if f"::: selfdistill.{name}\n" not in text] == []
