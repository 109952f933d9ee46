"""The report: one file that opens offline, holds the numbers of its folders, and shows model output as text."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from selfdistill.api import report as write_page
from selfdistill.cli import main
from selfdistill.comparison.plots import Curve, over, pareto_front, trade_off
from selfdistill.comparison.report import visible
from selfdistill.comparison.run_folders import read_folders
from selfdistill.config.files import dump_yaml, load_yaml
from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.evaluation.statistics import share_interval

CHROMIUM = shutil.which("chromium")
ATTACK = "<script>alert(1)</script>"
STEPS = 40


def jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def evaluation(right: int, prior: float, kl: float, **more: Any) -> dict[str, Any]:
    prior_right = round(prior * 50)
    file = {"accuracy": prior, "accuracy_norm": None, "interval": share_interval(prior_right, 50), "items": 50}
    return {
        "accuracy": right / 40,
        "accuracy_interval": share_interval(right, 40),
        "items": 40,
        "completion/length": 12.1,
        "completion/truncated": 0.025,
        "prior": {"arc_easy": file},
        "prior_accuracy": prior,
        "kl_base": kl,
        "seconds": 60.0 * right,
        **more,
    }


def view(step: int, row: int, tokens: list[str]) -> dict[str, Any]:
    shown = []
    for place, text in enumerate(tokens):
        logp = -0.05 if step else -2.5 + 0.3 * place
        logq = -0.02 if place % 3 else -4.5
        top = [[text, math.exp(logq)], ["\n", 0.004], [" box", 0.001]]
        shown.append({"text": text, "logp": logp, "logq": logq, "kl": (1.5 - step / STEPS) / (1 + place), "top": top})
    return {
        "step": step,
        "row": f"skill.jsonl:{row}",
        "prompt": f"Where is ticket {17 + row}? Answer with the shelf and the box, as the archive's list has them.",
        "teacher_sees": f"user: Where is it?\nassistant: Ticket {17 + row}: shelf B, box {step}.",
        "tokens": shown,
        "truncated": step == 0,
    }


def reply(step: int, row: int, **more: Any) -> dict[str, Any]:
    """A line of test_replies.jsonl, right after training."""
    return {
        "step": step,
        "source": f"test.jsonl:{row}",
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Where is {row}? {ATTACK}"},
        ],
        "answer": {"shelf": f"B{row} {ATTACK}"},
        "reply": f"On shelf B{row}. {ATTACK}" if step else " ",
        "correct": bool(step),
        "tokens": 7,
        **more,
    }


def write_run(folder: Path, method: str = "sdft", rate: float = 1e-4, seed: int = 0, optional: bool = True) -> None:
    folder.mkdir(parents=True)
    config = TrainConfig(
        model="smollm2-135m",
        data="skill.jsonl",
        output_dir=str(folder),
        method=method,
        learning_rate=rate,
        seed=seed,
        context="turns:repeats=2",
    )
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    lines = []
    for step in range(1, STEPS + 1):
        noise = 0.1 * math.sin(step * 2.7 + seed) + 0.05 * math.cos(step * 5.1)
        loss = (2.5 if method == "sft" else 0.8) * math.exp(-step / 12) + noise * math.exp(-step / 20) + 0.1
        line = {"step": step, "loss": loss, "entropy": 0.3 + loss, "completion/length": 18 + 20 * noise}
        if method != "sft":
            line |= {"kl/forward": loss, "kl/reverse": 0.8 * loss}
        if step % 10 == 0:
            line |= {"drift/student": (0.02 if method == "sft" else 0.01) * step, "drift/teacher": 0.0}
        lines.append(line)
    jsonl(folder / "metrics.jsonl", lines)
    if optional:
        fall = 0.3 if method == "sft" else 0.1
        jsonl(
            folder / "evaluations.jsonl",
            [
                evaluation(4 + 8 * n - seed * (n > 0), 0.86 - fall * n / 4, 0.2 * n * fall, step=10 * n)
                for n in range(5)
            ],
        )
        views = [
            view(step, row, ["Ticket", " 17", ":", " shelf", " B", ",", ATTACK, " box", " 4", ".", "\n", "<|im_end|>"])
            for step in (0, 20, STEPS)
            for row in range(1, 3)
        ]
        jsonl(folder / "token_views.jsonl", views)
        jsonl(folder / "test_replies.jsonl", [reply(step, row) for step in (0, STEPS) for row in (1, 2)])


def write_comparison(folder: Path) -> None:
    runs, table = [], []
    for method in ("sdft", "sft"):
        for seed in (0, 1):
            name = f"{method}-0.0001-{seed}"
            write_run(folder / name, method, 1e-4, seed)
            lines = (folder / name / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
            runs.append(
                {
                    "name": f"{method} 1e-4 seed {seed}",
                    "method": method,
                    "learning_rate": 1e-4,
                    "seed": seed,
                    "folder": name,
                    "evaluations": [json.loads(line) for line in lines[1:]],
                }
            )
        table.append(
            {
                "method": method,
                "learning_rate": 1e-4,
                "steps": STEPS,
                "accuracy": [0.8875, 0.73, 0.96],
                "prior_accuracy": [0.7, None, None],
                "kl_base": [0.08, 0.07, 0.09],
                "seconds": 1200.0,
            }
        )
    comparison = {
        "model": "smollm2-135m",
        "data": "skill.jsonl",
        "test": "test.jsonl",
        "prior": "prior/",
        "budget": "40 steps of 32 prompts each",
        "sentence": "At equal steps SDFT lost less of the prior abilities than SFT (0.10 against 0.30).",
        "base": evaluation(4, 0.86, 0.0),
        "teacher": {"accuracy": 0.95, "interval": [0.84, 0.99], "items": 40},
        "runs": runs,
        "table": table,
    }
    (folder / "comparison.json").write_text(json.dumps(comparison), encoding="utf-8")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on three runs, one with a hostile name, and a comparison."""
    folder = tmp_path_factory.mktemp("everything")
    runs = ["skill", "bare", "<img src=x onerror=alert(1)>&$x$"]
    for name in runs:
        write_run(folder / name, optional=name != "bare")
    write_comparison(folder / "both")
    assert main(["report", *(str(folder / name) for name in [*runs, "both"]), "-o", str(folder / "report.html")]) == 0
    return folder / "report.html"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run ``skill``, a bare run ``bare``, and a comparison ``both``."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "skill")
    write_run(tmp_path / "bare", optional=False)
    write_comparison(tmp_path / "both")
    return tmp_path


class Page(HTMLParser):
    """What a page consists of: its tags with attributes, its headings, and the text of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self._in_cell = self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag == "style"
        if tag in ("td", "th"):
            self._in_cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False
        if tag == "style":
            self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.text += data
        if self._in_cell:
            self.cells[-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def report(arguments: str) -> Page:
    assert main(shlex.split(f"report {arguments} -o report.html")) == 0
    return Page(Path("report.html").read_text(encoding="utf-8"))


def test_a_run_is_shown_whole(here: Path) -> None:
    page = report("skill")
    low, high = share_interval(36, 40)
    assert f"0.90 [{low:.2f}, {high:.2f}]" in page.cells
    assert "New task: accuracy 0.10" in page.text
    assert "turns:repeats=2" in page.cells  # settings
    figures = [svg["aria-label"] or "" for svg in page.attributes("svg")]
    assert len(figures) == 1 + 3 + 7 + 1  # trade-off, scores, curves, first-token profile
    assert "from (0.86, 0.1) to (0.76, 0.9)" in figures[0]
    profile = figures[-1]
    assert "step 0: from (1, 1.5) to (12, 0.125). step 40: from (1, 0.5) to (12, 0.0417)." in profile
    tokens = [span for span in page.attributes("span") if span.get("class", "").startswith("token ")]
    assert len(tokens) == 2 * 2 * 12  # two rows, first and last step
    assert all(token["tabindex"] == "0" for token in tokens)
    assert tokens[0]["aria-label"] == "Ticket: reward -2.00; teacher prefers Ticket 1%, ↵ <1%,  box <1%"
    assert tokens[0]["class"] == "token down"
    assert tokens[1]["aria-label"] == " 17: reward +2.18; teacher prefers  17 98%, ↵ <1%,  box <1%"


def test_long_completions_and_small_distances_keep_their_digits(here: Path) -> None:
    long = [evaluation(4, 0.8, 0.0042, step=step) | {"completion/length": 1024.4} for step in (0, STEPS)]
    jsonl(Path("skill/evaluations.jsonl"), long)
    comparison = json.loads(Path("both/comparison.json").read_text(encoding="utf-8"))
    for row in comparison["table"]:
        row["kl_base"] = [0.0042, 0.0031, 0.0053]
    Path("both/comparison.json").write_text(json.dumps(comparison), encoding="utf-8")
    page = report("skill both")
    assert {"1024", "0.0042", "0.004 [0.003, 0.005]"} <= set(page.cells)
    assert page.cells.count("KL(base||model), nats per token") == 3
    assert "(0, 1024) to (1200, 2048)" in over([Curve("c", [(0, 1024.4), (1200, 2048.1)])], "step", "tokens")


def test_only_the_start_of_a_long_rollout_is_coloured(here: Path) -> None:
    words = [f"w{number}" for number in range(1000)]
    jsonl(Path("skill/token_views.jsonl"), [view(STEPS, 1, words)])
    page = report("skill")
    assert "".join(words[600:]) in page.text
    assert len([span for span in page.attributes("span") if span.get("class", "").startswith("token ")]) == 600
    assert f"Step {STEPS}, the last 400 tokens not coloured" in page.text


def test_what_the_teacher_sees_is_shown_with_each_reply(here: Path) -> None:
    text = report("skill").text
    for step in (0, STEPS):
        assert text.count(f"Ticket 18: shelf B, box {step}.") == 1
    assert text.count("The teacher sees") == 4
    assert not re.search("Demonstration(?!s)", text)


def test_a_demonstration_is_shown_where_no_teacher_scored(here: Path) -> None:
    lines = Path("skill/token_views.jsonl").read_text(encoding="utf-8").splitlines()
    views = [json.loads(line) for line in lines]
    jsonl(Path("skill/token_views.jsonl"), [{"demonstration": one.pop("teacher_sees"), **one} for one in views])
    text = report("skill").text
    assert len(re.findall("Demonstration(?!s)", text)) == 2
    assert text.count("Ticket 18: shelf B, box 0.") == 1
    assert "The teacher sees" not in text


def test_the_loss_is_shown_by_part_where_steps_have_several(here: Path) -> None:
    assert "Loss by part" not in report("skill").text
    lines = [json.loads(line) for line in Path("skill/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    parts = {"loss/task": 0.5, "share/task": 0.75, "loss/anchors:package": 0.2, "share/anchors:package": 0.25}
    alone = {"loss/task": 0.6, "share/task": 1.0}  # a step without an anchor
    jsonl(Path("skill/metrics.jsonl"), [lines[0] | alone, *(line | parts for line in lines[1:])])
    page = report("skill")
    assert "Loss by part" in page.text
    labels = [svg["aria-label"] or "" for svg in page.attributes("svg")]
    (label,) = [label for label in labels if "anchors:package" in label]
    assert f"({STEPS}, 0.375)" in label
    assert f"({STEPS}, 0.05)" in label
    assert "(1, 0.487)" in label  # the running mean of 0.6 and 0.375
    assert "(1, 0.025)" in label  # of 0 and 0.05


def test_model_output_stays_text_and_nothing_is_fetched(everything: Path) -> None:
    page = Page(everything.read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "link", "iframe", "object"})
    assert ATTACK in page.text
    policy = next(meta["content"] for meta in page.attributes("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")


def test_an_episode_is_shown_as_a_transcript_whose_observations_have_no_colour(here: Path) -> None:
    run = Path("skill")
    turns = [
        {
            "tokens": 5,
            "calls": ["find"],
            "invalid": "",
            "observations": [{"speaker": "tool find", "text": f"id 7 {ATTACK}"}],
        },
        {
            "tokens": 3,
            "calls": [],
            "invalid": "no JSON",
            "observations": [{"speaker": "user", "text": "Error: no JSON"}],
        },
        {"tokens": 4, "calls": [], "invalid": "", "observations": []},
    ]
    words = [f"w{number}" for number in range(12)]
    one = view(0, 1, words) | {"reward": 0.5, "feedback": "one order too many", "turns": turns}
    other = view(STEPS, 1, words[:4]) | {"reward": None, "feedback": "", "turns": turns[2:]}
    jsonl(run / "token_views.jsonl", [one, other])
    means = {"episode/reward": 0.61, "episode/turns": 2.75, "episode/invalid_calls": 0.33}
    jsonl(run / "evaluations.jsonl", [evaluation(4, 0.8, 0.1, step=0), evaluation(9, 0.8, 0.1, step=STEPS, **means)])
    page = report("skill")
    text = " ".join(page.text.split())
    assert "Step 0, 3 turns, reward 0.50: one order too many" in text
    assert f"Step {STEPS}, 1 turn, not judged" in text
    places = [
        text.index(part)
        for part in ("assistant calls find", "w4", f"tool find id 7 {ATTACK}", "assistant, invalid: no JSON", "w7")
    ]
    assert places == sorted(places)
    tokens = [span for span in page.attributes("span") if span.get("class", "").startswith("token ")]
    assert [str(token["aria-label"]).split(":")[0] for token in tokens] == [*words, *words[:4]]
    assert page.attributes("script") == []
    assert {"mean reward", "turns", "invalid calls", "0.61", "2.75", "0.33"} <= {cell.strip() for cell in page.cells}


def squeezed(text: str) -> str:
    return "".join(text.split())


def test_replies_to_test_rows_are_shown_before_and_after_with_the_answer(here: Path) -> None:
    page = report("skill")
    (shown,) = re.findall(r"(?s)test.jsonl:1, (.*?)test.jsonl:2, ", page.text)
    assert squeezed(shown) == squeezed(
        f"wrong, then right: Where is 1? {ATTACK} Earlier turns system: Be brief. Prompt Where is 1? {ATTACK} Answer "
        f'{{"shelf": "B1 {ATTACK}"}} Step 0, wrong (empty reply) Step {STEPS}, right On shelf B1. {ATTACK}'
    )
    assert page.attributes("script") == []
    assert "Not in this report" not in page.text


def test_episodes_of_test_rows_are_shown_as_transcripts_with_their_verdicts(here: Path) -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {"name": ATTACK}}}
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "find", "content": f"id 7 {ATTACK}"},
        {"role": "assistant", "content": "It is 7."},
    ]
    ends = {"turns": 2, "invalid_calls": 0, "truncated": False}
    before = reply(0, 1, messages=messages[2:], reward=0.25, feedback=f"no look-up {ATTACK}", **ends | {"turns": 1})
    after = reply(STEPS, 1, messages=messages, reward=1.0, feedback="", **ends)
    jsonl(Path("skill/test_replies.jsonl"), [before, after])
    Path("skill/token_views.jsonl").unlink()  # as where no teacher scores
    page = report("skill")
    for part in (
        f"Step 0, wrong, 1 turn, reward 0.25: no look-up {ATTACK} assistant: It is 7.",
        f"Step {STEPS}, right, 2 turns, reward 1.00 assistant: Action: find Action Input: ",
        f"tool find: id 7 {ATTACK} assistant: It is 7.",
    ):
        assert squeezed(part) in squeezed(page.text)
    assert page.attributes("script") == []


def test_a_run_of_an_earlier_version_lacks_replies(here: Path) -> None:
    Path("skill/test_replies.jsonl").unlink()
    text = report("skill").text
    assert "No run here has replies to test rows." in text
    assert "replies to test rows: no test_replies.jsonl in skill" in text


def test_tools_and_earlier_turns_of_the_prompt_are_shown(here: Path) -> None:
    Path("skill/test_replies.jsonl").unlink()  # which show them, too
    before = "system: Be brief.\nuser: Hello.\nassistant: Hello."
    tools = ['{"name": "find"}', f'{{"name": "{ATTACK}"}}']
    words = view(0, 1, ["a", "", "界"])
    jsonl(Path("skill/token_views.jsonl"), [words | {"before": before, "tools": tools}])
    page = report("skill")
    assert before in page.text
    assert "\n".join(tools) in page.text
    tokens = [span for span in page.attributes("span") if span.get("class", "").startswith("token ")]
    assert [str(token["aria-label"]).split(":")[0] for token in tokens] == ["a", "(empty)", "界"]
    assert "·" in page.text
    jsonl(Path("skill/token_views.jsonl"), [words])  # as earlier versions wrote it
    page = report("skill")
    assert "Earlier turns" not in page.text
    assert "Tools" not in page.text


def test_the_page_is_accessible(everything: Path) -> None:
    page = Page(everything.read_text(encoding="utf-8"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(page.attributes("caption")) == len(page.attributes("table"))
    assert all(cell.get("scope") in ("col", "row") for cell in page.attributes("th"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.attributes("svg"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {"header", "main", "nav", "footer"} <= {tag for tag, _ in page.tags}
    links = [str(link["href"])[1:] for link in page.attributes("a")]
    assert set(links) <= set(ids)


def test_what_is_missing_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("bare/metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 41, "lo')  # being written, left out
    page = report("bare")
    assert f"{STEPS} steps." in page.text
    assert "scores during training: no evaluations.jsonl in bare" in page.text
    assert "rollouts by token: no token_views.jsonl in bare" in page.text
    assert page.text.index("Not in this report") > page.text.index("No figure of new-task score")
    assert "The loss went from" in page.text
    (here / "bare" / "metrics.jsonl").write_text("", encoding="utf-8")
    capsys.readouterr()
    assert "No steps yet." in report("bare --json -").text
    summary = ["bare: smollm2-135m trained on skill.jsonl with sdft for 0 steps."]
    assert json.loads(capsys.readouterr().out) == {"output": "report.html", "summary": summary}


def test_a_folder_that_is_named_in_two_ways_is_one_run(here: Path) -> None:
    assert len(read_folders(["bare", "bare/", "./bare", str(here / "bare")])[0].runs) == 1


def test_a_comparison_is_shown_with_its_runs(everything: Path) -> None:
    page = Page(everything.read_text(encoding="utf-8"))
    assert "At equal steps SDFT lost less" in page.text
    assert "0.89 [0.73, 0.96]" in page.cells
    assert "0.70" in page.cells  # the interval of one seed is not a number, and not shown
    trade = str(page.attributes("svg")[0]["aria-label"])
    # Means of the two seeds, from the base on; 36 and 35 of 40 right at the last step.
    assert "sdft 0.0001: from (0.86, 0.1) to (0.76, 0.887)." in trade
    assert "sft 0.0001: from (0.86, 0.1) to (0.56, 0.887)." in trade
    assert "Base at (0.86, 0.1). Teacher: 0.95." in trade
    assert "sdft 0.0001, step 40" in page.cells
    assert "sft 0.0001, step 40" not in page.cells  # not on the front
    profiles = re.findall("First-token profile of (.*)", page.text)
    assert profiles[:2] == ["sdft 1e-4 seed 0", "sft 1e-4 seed 0"]  # the first seed of each method
    assert len(profiles) == 2 + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no runs: give at least one run folder; see selfdistill report --help"),
        ("nowhere", "nowhere: no such folder; give folders written by selfdistill train or compare"),
        (".", ".: has neither config.yaml nor comparison.json; give a run folder"),
        ("state", "state: a state of selfdistill learn, not a run; give its runs, state/skills/*/run"),
        ("skill -o no/report.html", "no/report.html: cannot be written; give a file in an existing folder"),
        ("skill --output both", "both: cannot be written; give a file in an existing folder"),
        ("empty", "empty: has no metrics.jsonl; give the folder of a run that has started"),
        ("broken", "broken/metrics.jsonl: line 2 is not an object with step; remove the line"),
        ("cut", "cut/comparison.json: missing base, sentence; compare again"),
        ("odd", "odd/comparison.json: not a result of selfdistill compare; compare again"),
    ],
)
def test_mistakes_are_one_line(here: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    for name in ("empty", "broken"):
        shutil.copytree("bare", name)
    Path("empty/metrics.jsonl").unlink()
    for part in ("start", "skills"):
        Path("state", part).mkdir(parents=True)
    Path("broken/metrics.jsonl").write_text('{"step": 1}\n{"loss": 1}\n{"st', encoding="utf-8")
    for name in ("cut", "odd"):
        Path(name).mkdir()
    Path("cut/comparison.json").write_text('{"runs": [], "table": []}', encoding="utf-8")
    Path("odd/comparison.json").write_text("{}", encoding="utf-8")
    assert main(["report", *shlex.split(arguments)]) == 2
    assert capsys.readouterr().err == f"selfdistill: error: {message}\n"


@pytest.mark.parametrize(
    ("patched", "value", "message"),
    [
        ("selfdistill.runtime.files.os.access", False, "give a file in an existing folder"),
        ("pathlib.Path.write_text", OSError(28, "No space left on device"), "(No space left on device)"),
    ],
)
def test_a_page_that_cannot_be_written_is_the_users_error(
    here: Path, monkeypatch: pytest.MonkeyPatch, patched: str, value: Any, message: str
) -> None:
    def answers(*_: Any, **__: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(patched, answers)
    with pytest.raises(UserError, match=re.escape(message)):
        write_page("skill", output="page.html")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" shelf", " shelf"),
        ("  ", "␣␣"),
        ("\n", "↵"),
        (".\n\t", ".↵⇥"),
        ("", "(empty)"),
        ("<|im_end|>", "<|im_end|>"),
        ("a\u202eb\x1b\ud83d", "a\\u202eb\\u001b\\ud83d"),
    ],
)
def test_what_would_not_be_seen_is_marked(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_pareto_front_against_its_definition() -> None:
    points = [((7 * n) % 13 / 13, (5 * n) % 11 / 11) for n in range(40)]

    def beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)

    assert pareto_front(points) == sorted({point for point in points if not beaten(point)})


def test_figures_stand_alone_and_in_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    real = Figure.savefig

    def counted(figure: Figure, *args: Any, **options: Any) -> None:
        drawn.append(options["format"])
        real(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", counted)
    curves = [
        Curve('a <b> & "$1$"', [(0.8, 0.1), (0.7, 0.9)], [[(0.8, 0.1), (0.7, 0.8)], [(0.8, 0.1), (0.7, 1.0)]]),
        Curve("_empty", []),
    ]
    file = tmp_path / "trade_off.svg"
    inline = trade_off(curves, [(0.8, 0.1)], 0.95, "kept", "learnt", file=file)
    assert drawn == ["svg"]
    alone = file.read_text(encoding="utf-8")
    root = ElementTree.fromstring(inline)
    assert root.get("role") == "img"
    assert "#1a1b1c" not in inline
    assert "currentColor" in inline
    assert "currentColor" not in alone
    assert "fill: #ffffff" in alone
    assert "fill: #ffffff" not in inline
    for svg in (inline, alone):
        words = [text.text for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
        assert 'a <b> & "$1$"' in words
        assert {"kept", "learnt", "teacher", "base", "Pareto front"} <= set(words)
    ids = re.findall(r'\bid="([^"]*)"', inline)
    assert set(ids) >= set(re.findall(r'(?:href="#|url\(#)([^")]*)', inline))
    assert set(ids).isdisjoint(re.findall(r'\bid="([^"]*)"', trade_off(curves, [], None, "kept", "learnt")))
    assert "(0, 1) to (99, 1)" in over([Curve("flat", [(x, 1.0) for x in range(100)])], "step", "loss", smooth=True)


def test_points_that_tie_on_the_front_are_all_named(tmp_path: Path) -> None:
    write_run(tmp_path / "still", "sdft", 1e-4, 0)
    jsonl(
        tmp_path / "still" / "evaluations.jsonl", [{"step": step, **evaluation(4, 0.86, 0.0)} for step in (0, 20, 40)]
    )
    assert main(["report", str(tmp_path / "still"), "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "base, still, step 20, still, step 40" in page


@pytest.mark.skipif(CHROMIUM is None, reason="NO CHROMIUM: the report was not opened in a browser")
def test_in_a_browser(everything: Path, tmp_path: Path) -> None:
    """As it is, and on a phone with a script that looks around in it, which its policy would stop."""
    page = everything.read_text(encoding="utf-8")
    probe = """<script>
        const token = document.querySelector(".token"), tip = token.querySelector(".tip");
        const shown = [getComputedStyle(tip).display];
        token.focus();
        shown.push(getComputedStyle(tip).display);
        const sideways = document.documentElement.scrollWidth - document.documentElement.clientWidth;
        parent.postMessage([sideways, shown, document.scripts.length, innerWidth], "*");
    </script></html>"""
    probed = re.sub("<meta http-equiv[^>]*>", "", page).replace("</html>", probe)
    (tmp_path / "probed.html").write_text(probed, encoding="utf-8")
    frames = f"""<script>onmessage = event => {{ document.title = JSON.stringify(event.data); }}</script>
        <iframe src="{everything.as_uri()}"></iframe>
        <iframe src="probed.html" style="width: 390px; height: 844px; border: 0"></iframe>"""
    (tmp_path / "frames.html").write_text(frames, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=3000"
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            *flags.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            (tmp_path / "frames.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search("<title>(.*)</title>", done.stdout)
    assert title is not None
    assert json.loads(title[1]) == [0, ["none", "block"], 1, 390]  # no sideways scrolling, the tip, the probe alone


@pytest.mark.parametrize("length", [4, 15, 24])
def test_a_legend_is_not_wider_than_its_figure(length: int) -> None:
    names = [f"{number}".rjust(length, "n") for number in range(6)]
    svg = over([Curve(name, [(0.0, 0.0), (1.0, 1.0)]) for name in names], "step", "y")
    view = re.search(r'viewBox="0 0 ([\d.]+)', svg)
    starts = [float(x) for x in re.findall(r'text-anchor: start[^>]* x="(-?[\d.]+)"', svg)]
    assert view
    assert len(starts) == len(names)
    assert min(starts) > 28  # the line before the name
    assert max(starts) < float(view[1]) - 6 * length


def drawn(names: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Figure, str]:
    """A figure with a curve of each name, and its SVG."""
    figures: list[Figure] = []
    real = Figure.savefig

    def remembered(figure: Figure, *args: Any, **options: Any) -> None:
        figures.append(figure)
        real(figure, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", remembered)
        svg = over([Curve(name, [(0.0, 0.0), (1.0, 1.0)]) for name in names], "step", "y")
    return figures[0], svg


@pytest.mark.parametrize("length", [4, 24, 90])
def test_a_long_legend_does_not_shrink_the_axes(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number}".rjust(length, "n") for number in range(14)]
    (few, _), (many, svg) = drawn(names[:9], monkeypatch), drawn(names, monkeypatch)
    low, high = (figure.axes[0].get_window_extent().height * 72 / figure.dpi for figure in (few, many))
    assert low > 120
    assert high > 0.95 * low
    words = [str(text.text) for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    (last,) = [word for word in words if word.endswith("n13")]
    assert ("..." in last) == (length == 90)
    assert names[-1] in svg  # the figure in words has the whole name


def test_no_two_curves_differ_by_their_colour_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    figure, _ = drawn([str(number) for number in range(15)], monkeypatch)
    looks = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines]
    assert len(looks) == len(set(looks)) == 15
    assert all(one[1] != other[1] for one, other in itertools.pairwise(looks))


def test_every_base_has_a_star() -> None:
    curves = [Curve("a", [(0.8, 0.1), (0.7, 0.9)])]
    assert " Base at (0.85, 0) and (0.84, 0)." in trade_off(curves, [(0.85, 0.0), (0.84, 0.0)], None, "kept", "learnt")


@pytest.mark.parametrize(
    ("setting", "of_a", "of_b"),
    [("test", "test.jsonl", "other.jsonl"), ("max_completion_length", 8, 64), ("judge_model", "one", "other")],
)
def test_runs_that_cannot_be_compared_share_no_figure(tmp_path: Path, setting: str, of_a: object, of_b: object) -> None:
    for name, own in (("a", of_a), ("b", of_b)):
        write_run(tmp_path / name)
        file = tmp_path / name / "config.yaml"
        values = load_yaml(file, TrainConfig) | {setting: own}
        if setting == "judge_model":
            values |= {"scorer": "judge", "judge_url": "http://localhost:1"}
        file.write_text(dump_yaml(TrainConfig(**values)), encoding="utf-8")
    page = str(tmp_path / "r.html")
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "-o", page]) == 0
    text = Path(page).read_text(encoding="utf-8")
    assert f"prior score: runs that differ in {setting} have scores that cannot be compared.</p>" in text
    assert "Pareto front" not in text
    assert main(["report", str(tmp_path / "a"), "-o", page]) == 0
    assert "Pareto front" in Path(page).read_text(encoding="utf-8")
