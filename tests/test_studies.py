"""The studies run from their beginning to their table, here with a tiny model and a step or two."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from results_pages import results_text
from safetensors.torch import load_file

from selfdistill.config import CheckConfig
from selfdistill.continual.learn import retention_matrix
from selfdistill.continual.ledger import Ledger
from selfdistill.data.demonstrations import load_demonstrations
from selfdistill.data.sources import packaged
from selfdistill.evaluation.spill import Spill, Trial
from selfdistill.runtime.tracking import read_lines

STUDIES = Path(__file__).resolve().parents[1] / "studies"


@pytest.fixture(autouse=True)
def siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies import from each other, as they do when run as scripts."""
    monkeypatch.syspath_prepend(STUDIES)


def study(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cut(folder: Path, count: int) -> Callable[[str], str]:
    """The first rows of the package's files, in a folder; in place of a folder, one file of it."""

    def of(name: str) -> str:
        name = name if "." in name else f"{name}/facts.jsonl"
        lines = Path(packaged(name)).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(lines[:count]), encoding="utf-8")
        return str(folder / name)

    return of


@pytest.fixture
def model(model_folder: Callable[..., Path]) -> str:
    return str(model_folder(room=8192, ends=(257, *range(40, 75))))


SHORT: dict[str, Any] = {"max_completion_length": 200, "batch_size": 2, "max_steps": 2, "mixed_precision": "no"}
SHORT |= {"drift_steps": 0, "view_rows": 0}


@pytest.mark.slow
def test_three_skills_in_a_row(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sequence = study("sequence")
    monkeypatch.setattr(sequence, "MODEL", model)
    monkeypatch.setattr(sequence, "LOOKS", 1)
    monkeypatch.setattr(sequence, "packaged", cut(tmp_path, 2))
    monkeypatch.setattr(sequence, "SKILLS", {name: values | SHORT for name, values in sequence.SKILLS.items()})
    arms = {name: sequence.ARMS[name] | {"context": "turns"} for name in ("sdft", "sdft+anchors")}
    arms = {
        name: settings | (SHORT | {"batch_size": 4} if settings["anchors"] else {}) for name, settings in arms.items()
    }
    monkeypatch.setattr(sequence, "ARMS", arms)
    sequence.main([str(tmp_path / "made"), "--seed", "0"])
    said = capsys.readouterr().out
    heads = [
        line.split(" | ")[0] for line in said.splitlines() if line.endswith(" | knowledge | routing | tools | prior |")
    ]
    assert heads == [f"| {arm} after" for arm in arms]
    kept = json.loads((tmp_path / "made" / "sequence.json").read_text())
    assert list(kept) == [f"{arm}-0" for arm in arms]
    state = Ledger(str(tmp_path / "made" / "sdft-0"))
    assert kept["sdft-0"]["matrix"] == retention_matrix(state)["matrix"]
    assert [line["step"] for line in kept["sdft-0"]["along"]] == [0, 2, 2, 4, 4, 6]
    assert [line["step"] for line in kept["sdft+anchors-0"]["along"]] == [0, 5, 5, 10, 10, 15]
    assert kept["sdft+anchors-0"]["alone"] == kept["sdft-0"]["alone"]
    assert kept["sdft+anchors-0"]["alone_where"] == kept["sdft-0"]["alone_where"]
    for at in (kept["sdft-0"]["where"], kept["sdft+anchors-0"]["where"], kept["sdft-0"]["alone_where"]):
        assert list(at) == list(sequence.SKILLS)
        assert all(one["device"] and one["threads"] == torch.get_num_threads() for one in at.values())
        assert {(one["precision"], one["torch"]) for one in at.values()} == {("float32", torch.__version__)}
    last = Ledger(str(tmp_path / "made" / "sdft+anchors-0")).skills[-1]
    assert (last.folder / "memory.jsonl").is_file()
    assert (tmp_path / "made" / "sequence.svg").is_file()

    for run in kept.values():  # older ones do not say where
        del run["where"], run["alone_where"]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "sequence.json").write_text(json.dumps(kept))
    sequence.main([str(tmp_path / "again"), "--seed", "0"])
    assert said.endswith(capsys.readouterr().out)
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == ["sequence.json", "sequence.svg"]


def test_arms_of_the_sequence_differ_in_steps_and_share() -> None:
    sequence = study("sequence")
    plain = sequence.ARMS["sdft+anchors"]
    for skill in sequence.SKILLS:
        assert sequence.steps_of(skill, "sdft+anchors+steps") == 2 * sequence.steps_of(skill, "sdft+anchors")
        rows, quarter = (
            sequence.steps_of(skill, arm) * (1 - sequence.ARMS[arm]["anchor_share"])
            for arm in ("sdft+anchors", "sdft+anchors+quarter")
        )
        assert quarter == pytest.approx(rows, abs=0.5)  # steps are rounded
    assert sequence.ARMS["sdft+anchors+quarter"] == plain | {"anchor_share": plain["anchor_share"] / 2}


@pytest.mark.slow
def test_an_arm_learns_the_skills_in_its_own_order(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sequence, reversed_arm = study("sequence"), "sdft+anchors+reversed"
    monkeypatch.setattr(sequence, "MODEL", model)
    monkeypatch.setattr(sequence, "packaged", cut(tmp_path, 2))
    monkeypatch.setattr(sequence, "SKILLS", {name: values | SHORT for name, values in sequence.SKILLS.items()})
    short = {"context": "turns"} | SHORT
    monkeypatch.setattr(
        sequence,
        "ARMS",
        {"sdft": sequence.ARMS["sdft"] | short, reversed_arm: sequence.ARMS[reversed_arm] | short | {"batch_size": 4}},
    )
    sequence.main([str(tmp_path / "made"), "--arm", reversed_arm, "--seed", "0"])
    assert f"| {reversed_arm} after | tools | routing | knowledge | prior |" in capsys.readouterr().out
    assert [skill.name for skill in Ledger(str(tmp_path / "made" / f"{reversed_arm}-0")).skills] == [
        "tools",
        "routing",
        "knowledge",
    ]


@pytest.mark.slow
def test_a_skill_as_a_stream(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = study("stream")
    monkeypatch.setattr(stream, "MODEL", model)
    monkeypatch.setattr(stream, "packaged", cut(tmp_path, 6))
    short = {"chunk_size": 2, "chunk_steps": 2, "context": "turns", "max_completion_length": 200, "batch_size": 4}
    short |= {"drift_steps": 0, "view_rows": 0}
    monkeypatch.setattr(stream, "STREAM", stream.STREAM | short | {"mixed_precision": "no"})
    stream.main([str(tmp_path / "made"), "--arm", "sdft", "--arm", "sdft+anchors", "--seed", "1"])
    table = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split(" | ")[0] for line in table[2:]] == ["| sdft", "| sdft+anchors", "| base"]
    kept = json.loads((tmp_path / "made" / "stream.json").read_text())
    assert list(kept) == ["sdft-1", "sdft+anchors-1"]
    assert len(kept["sdft-1"]["before"]) == 3
    assert kept["sdft-1"]["steps"] == 6
    at = kept["sdft-1"]["where"]
    assert (at["threads"], at["precision"]) == (torch.get_num_threads(), "float32")
    del kept["sdft-1"]["where"]  # as in older runs
    (tmp_path / "made" / "stream.json").write_text(json.dumps(kept))

    stream.main([str(tmp_path / "made"), "--arm", "sdft", "--arm", "sdft+anchors", "--seed", "1"])
    assert capsys.readouterr().out.splitlines() == table


def test_the_tables_of_the_sequences_are_what_was_measured() -> None:
    docs = STUDIES.parent / "docs"
    found = json.loads((docs / "comparisons" / "sequence.json").read_text(encoding="utf-8"))
    text = results_text()
    sequence = study("sequence")
    runs = {arm: [found[f"{arm}-{seed}"] for seed in (0, 1, 2) if f"{arm}-{seed}" in found] for arm in sequence.ARMS}
    assert len(runs["sft"]) == len(runs["sdft"]) == 3
    for arm in filter(runs.get, runs):
        assert "\n".join(sequence.table(arm, runs[arm])) in text


def test_the_table_of_the_stream_is_what_was_measured() -> None:
    docs, stream = STUDIES.parent / "docs", study("stream")
    found = json.loads((docs / "comparisons" / "stream.json").read_text(encoding="utf-8"))
    seeds = sorted({int(run.rsplit("-", 1)[1]) for run in found})
    assert set(found) == {f"{arm}-{seed}" for arm in stream.ARMS for seed in seeds}
    assert "\n".join(stream.table(found, list(stream.ARMS), seeds)) in results_text()


@pytest.mark.slow
def test_knowledge_from_documents(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    knowledge = study("knowledge")
    questions = tmp_path / "made" / "questions"
    questions.mkdir(parents=True)
    row = json.loads(Path(packaged("knowledge.train.jsonl")).read_text().splitlines()[0])
    (questions / "train.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "made" / "made.json").write_text("{}")  # a random model makes none
    monkeypatch.setattr(knowledge, "MODEL", model)
    monkeypatch.setattr(knowledge, "RUN", knowledge.RUN | SHORT)
    runs = {name: run for name, run in knowledge.RUNS.items() if run != ("sft", "made") and run != ("sdft", "package")}
    monkeypatch.setattr(knowledge, "RUNS", runs)
    knowledge.main(tmp_path / "made", [0])
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("| ") and "---" not in line]
    assert [line.split(" | ")[0].strip("| ") for line in lines[1:]] == ["base", "oracle RAG", *knowledge.RUNS]
    found = json.loads((tmp_path / "made" / "knowledge.json").read_text())
    tests = load_demonstrations(packaged("knowledge.test.jsonl"))
    reached = sum(test.answer == row["answer"] for test in tests)
    assert f"{reached} of {len(tests)} answers are in the model's own questions" in said
    for runs in found.values():
        assert [len(items) for items in runs[0].values()] == [30, 30, 24, 24, 90, reached]


def test_the_table_of_the_documents_is_what_was_measured() -> None:
    docs = STUDIES.parent / "docs"
    found = json.loads((docs / "comparisons" / "knowledge.json").read_text(encoding="utf-8"))
    text = results_text()
    knowledge = study("knowledge")
    assert set(found) == {"base", "oracle RAG", *knowledge.RUNS}
    for name, runs in found.items():
        assert re.sub(r"\b0\.", ".", knowledge.line(name, runs)) in text


@pytest.mark.slow
def test_a_skill_is_moved_by_a_difference_of_weights(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    past = study("past")
    monkeypatch.setattr(past, "packaged", cut(tmp_path, 3))
    short = {"max_completion_length": 100, "mixed_precision": "no"}
    monkeypatch.setattr(past, "COMMON", past.COMMON | short)
    for name in ("SFT", "FURTHER", "SORT"):
        monkeypatch.setattr(past, name, getattr(past, name) | {"max_steps": 2, "batch_size": 2})
    made = tmp_path / "made"
    past.main(str(made), "0", model)
    table = capsys.readouterr().out.splitlines()
    names = ("base", "source", "rewarded", "longer", "target", "merged from rewarded", "merged from longer")
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in names]
    (folder,) = made.iterdir()

    def weights(name: str, folder: Path = folder) -> dict[str, torch.Tensor]:
        return load_file(folder / name / ("" if name.startswith("merged") else "final") / "model.safetensors")

    source, target = weights("source"), weights("target")
    for taught in ("rewarded", "longer"):
        added = weights(taught)
        for name, merged in weights(f"merged from {taught}").items():
            assert torch.allclose(merged, target[name] + added[name] - source[name], atol=1e-6)
    shutil.rmtree(folder / "target" / "final")  # as if stopped: what is there, is not made again
    past.main(str(made), "0", model)
    assert capsys.readouterr().out.splitlines() == table
    past.main(str(made), "1", model)
    (other,) = set(made.iterdir()) - {folder}
    assert any(not torch.equal(values, source[name]) for name, values in weights("source", other).items())


@pytest.mark.slow
def test_spill_of_skills(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spill = study("spill")
    monkeypatch.setattr("study_file.packaged", cut(tmp_path, 3))
    spill.main(model, json.dumps({"max_completion_length": 200, "mixed_precision": "no"}))
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:2] for line in lines] == [[name, method] for name in spill.NAMES for method in ("SFT", "SDFT")]
    for _, method, gain, moved in lines:
        assert float(moved) >= 0
        if method == "SFT":
            assert float(gain) > 0


def test_spill_is_tried_at_the_rate_of_each_methods_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spill, asked = study("spill"), []

    def check(config: CheckConfig) -> SimpleNamespace:
        asked.append((Path(config.data).name, config.learning_rate))
        trials = [Trial(gain=1e5 * config.learning_rate, moved=moved) for moved in (1, 2)]
        return SimpleNamespace(spill=Spill(*trials))

    monkeypatch.setattr(spill, "check", check)
    spill.main()
    assert asked[:3] == [("routing.train.jsonl", 5e-5), ("tools.train.jsonl", 5e-5), ("tools.train.jsonl", 1e-4)]
    said = capsys.readouterr().out.splitlines()[2:]
    assert said[:3] == [
        "| routing | SFT | 5.00 | 1.000 |",
        "| routing | SDFT | 5.00 | 2.000 |",
        "| tools | SFT | 5.00 | 1.000 |",
    ]
    assert said[3] == "| tools | SDFT | 10.00 | 2.000 |"
    assert len(said) == 2 * len(spill.NAMES)


def test_lenient_is_half_of_the_words() -> None:
    lenient = study("knowledge").lenient
    assert lenient("Dorothy Finch", "it is Dorothy")
    assert lenient(["a red fox", "vixen"], "A fox, red as rust.")
    assert not lenient("walnut wood from the hills", "wood")
    assert not lenient("Dorothy Finch", "it is Ingrid")


def test_thinking_of_answers_alone(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thinking = study("thinking")
    monkeypatch.setattr(thinking, "MODEL", model)
    monkeypatch.setattr(thinking, "THINK_STEPS", 2)
    monkeypatch.setattr(thinking, "TESTS", 4)
    monkeypatch.setattr(thinking, "COMMON", thinking.COMMON | SHORT)
    monkeypatch.setattr(thinking, "LEARN", thinking.LEARN | {"max_steps": 2})
    thinking.main(tmp_path / "made", [0])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[-3:]] == ["thinking model", "sft", "sdft"]
    rows = read_lines(tmp_path / "made" / "sums.jsonl")
    assert all(eval_sum(row["prompt"]) == int(row["answer"]) for row in rows)


def eval_sum(question: str) -> int:
    """The sum in ``What is a + b?``."""
    first, second = question.removeprefix("What is ").removesuffix("?").split(" + ")
    return int(first) + int(second)


@pytest.mark.parametrize(
    ("gpu", "fast", "forced"), [(True, True, "bf16"), (True, False, "bf16"), (False, True, None), (False, False, "no")]
)
def test_the_arithmetic_of_a_study_is_what_is_fast_here(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, fast: bool, forced: str | None
) -> None:
    runner = importlib.import_module("study")  # its data classes need the module in its place
    monkeypatch.setattr(runner.torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(runner, "bfloat16_is_fast", lambda: fast)
    assert runner.arithmetic_here() == forced


def test_comparisons_made_apart_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads((STUDIES.parent / "docs" / "comparisons" / "facts.json").read_text())
    parts = []
    for seed in (2, 0, 1):
        part = whole | {"runs": [run for run in whole["runs"] if run["seed"] == seed]}
        parts.append(tmp_path / f"{seed}.json")
        parts[-1].write_text(json.dumps(part))
    study("merge").main(str(tmp_path / "facts"), 0.97, [str(part) for part in (*parts, parts[0])])
    merged = json.loads((tmp_path / "facts.json").read_text())
    assert sorted(merged["runs"], key=str) == sorted(whole["runs"], key=str)
    assert [run["seed"] for run in merged["runs"]] == [0, 0, 1, 1, 2, 2]
    assert "sdft forgot less than sft" in capsys.readouterr().out
    assert (tmp_path / "facts.svg").is_file()


def test_runs_of_unlike_bases_are_merged_and_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = STUDIES.parent / "docs" / "comparisons" / "baselines.json"
    study("merge").main(str(tmp_path / "baselines"), 0.97, [str(kept)])
    said = capsys.readouterr().out
    assert "The base did not give the same answers in all runs (new task 0.000, prior 0.867 or 0.878)" in said
    assert "| dft | 80 | 0.07 | " in said  # three equal seeds


def test_equal_seeds_of_the_documents_have_no_interval() -> None:
    share = study("knowledge").share
    assert share([[True, False]] * 3) == "0.50"
    assert share([[True, False]]) == "0.50 (0.09 to 0.91)"


def test_seeds_of_the_demo_make_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def point(new: float, seconds: float) -> dict[str, Any]:
        return {"new": new, "prior": 0.75, "kinds": {"code": 0.5, "facts": 1.0}, "kl": 0.25, "seconds": seconds}

    for seed, new in ((0, 0.5), (1, 1.0)):
        arms = {"SFT": point(new, 60 + 60 * seed), "SDFT": point(1.0, 180)}
        kept = {"seed": seed, "teacher": new, "base": point(0.0, 0), "arms": arms}
        (tmp_path / f"{seed}.json").write_text(json.dumps(kept))
    study("demo_seeds").main([str(tmp_path / "0.json"), str(tmp_path / "1.json")])
    same = "0.750 (0.750 to 0.750) | 0.250 (0.250 to 0.250)"
    assert capsys.readouterr().out.splitlines() == [
        "| 2 seeds | new | prior | KL | minutes |",
        "|---|---|---|---|---|",
        f"| base | 0.000 (0.000 to 0.000) | {same} | 0.000 (0.000 to 0.000) |",
        "| teacher | 0.750 (0.500 to 1.000) | | | |",
        f"| SFT | 0.750 (0.500 to 1.000) | {same} | 1.500 (1.000 to 2.000) |",
        f"| SDFT | 1.000 (1.000 to 1.000) | {same} | 3.000 (3.000 to 3.000) |",
        "",
        "| seed | arm | new | prior | KL | code | facts |",
        "|---|---|---|---|---|---|---|",
        "| 0 | SFT | 0.500 | 0.750 | 0.250 | 0.500 | 1.000 |",
        "| 0 | SDFT | 1.000 | 0.750 | 0.250 | 0.500 | 1.000 |",
        "| 1 | SFT | 1.000 | 0.750 | 0.250 | 0.500 | 1.000 |",
        "| 1 | SDFT | 1.000 | 0.750 | 0.250 | 0.500 | 1.000 |",
    ]
