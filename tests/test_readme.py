"""The README is executed: its data, its commands and its Python, with a tiny model in place of the starter model."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from selfdistill.cli import main
from selfdistill.data.contexts import CONTEXTS, parse_context
from selfdistill.data.demonstrations import SCORER_NAMES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    text = "".join(blocks("sh")).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def test_every_command_and_python_block_works(
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (data,) = blocks("json")
    Path("skill.jsonl").write_text(data, encoding="utf-8")
    tiny = str(model_folder())
    found = commands()
    assert [command[:2] for command in found] == [
        ["selfdistill", c] for c in ("check", "train", "eval", "compare", "report", "export", "learn", "learn")
    ]
    codes = [main([tiny if word == "smollm2-135m" else word for word in command[1:]]) for command in found]
    # A random model teaches nothing, and check says so with its own code.
    # So does learn, which then does not accept the skill.
    assert codes == [4, 0, 0, 0, 0, 0, 4, 0], capsys.readouterr().err
    output = capsys.readouterr().out
    result, _ = json.JSONDecoder().raw_decode(output[output.index("\n{\n") + 1 :])
    assert {"accuracy", "kl_base"} <= result.keys()
    assert "sdft 0.0001 seed 1" in Path("report.html").read_text(encoding="utf-8")
    assert Path("skill-model/model.safetensors").is_file()
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_the_two_commands_are_make_targets_that_set_up_first() -> None:
    for target in re.findall(r"^make (\S+)$", README, re.MULTILINE):
        done = subprocess.run(
            ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "pip install" in done.stdout
        assert {"demo": "selfdistill demo", "test": "pytest"}[target] in done.stdout


def test_tables_name_what_there_is() -> None:
    specs = re.findall(r"^\| `(\w+:[^`]*)` \|", README, re.MULTILINE)
    assert {spec.partition(":")[0] for spec in specs} == set(CONTEXTS)
    for spec in specs:
        if not spec.startswith("template"):
            parse_context(spec)
    scorers = re.search(r"\| `answer`, `scorer` \| (.*) \|", README)
    assert scorers is not None
    assert tuple(re.findall(r"`(\w+)`", scorers[1])) == SCORER_NAMES


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
