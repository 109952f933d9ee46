"""Studies from files: stopped and resumed between runs, each run as if it were alone, and tables worked out by hand."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import pytest
import yaml
from conftest import ENDS

import selfdistill as sd
from selfdistill.cli_parser import parse
from selfdistill.config.train import TrainConfig
from selfdistill.data.bundled import anchor_kinds, anchor_prompts
from selfdistill.data.demonstrations import Demonstration, load_demonstrations
from selfdistill.evaluation.evaluator import Evaluator
from selfdistill.evaluation.generate import generate
from selfdistill.model.loading import LoadedModel, load_for_training
from selfdistill.runtime.tracking import read_lines
from selfdistill.training.train import train

ROOT = Path(__file__).resolve().parents[2]
ORDER = [("lora", 0), ("sdft", 0), ("lora", 1), ("sdft", 1)]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "studies")
    return import_module("study")


@pytest.fixture
def write(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> Callable[..., list[str]]:
    """Write a study of a tiny model, two arms and two seeds; returns the arguments that run it."""
    (tmp_path / "prior").mkdir()
    for kind in ("easy", "hard"):
        write_rows([{"prompt": f"{kind} {n}?", "answer": str(n)} for n in range(3)], name=f"prior/{kind}.jsonl")
    data, test, shown = (str(write_rows(count=n, name=f"{n}.jsonl")) for n in (6, 2, 3))

    def make(**values: Any) -> list[str]:
        settings = {
            "model": str(model_folder(ends=ENDS, layers=1)),
            "data": data,
            "test": test,
            "prior": str(tmp_path / "prior"),
            "context": "turns",
            "max_completion_length": 10,
            "batch_size": 2,
            "max_steps": 4,
            "eval_steps": 2,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
        }
        content = {
            "name": "tiny",
            "settings": settings,
            "arms": {"lora": {"method": "sft", "lora_rank": 2}, "sdft": {}},
            "seeds": [0, 1],
            "after": [{"name": "teacher", "data": shown, "context": "turns:repeats=2"}],
            "nearest": ["easy"],
        }
        file = tmp_path / "tiny.yaml"
        file.write_text(yaml.safe_dump(content | values, sort_keys=False))
        return ["--results", str(tmp_path / "results"), str(file)]

    return make


@pytest.fixture
def lines(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    return lambda: read_lines(tmp_path / "results" / "tiny.jsonl")


# --- running ---


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_study_goes_on_with_the_run_that_was_stopped(
    sent: signal.Signals,
    study: ModuleType,
    write: Callable[..., list[str]],
    lines: Callable[[], list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began: list[tuple[str, int]] = []
    stop_in = 3

    def stopped(config: TrainConfig, **options: Any) -> Path:
        began.append(("lora" if config.lora_rank else "sdft", config.seed))

        def on_step(step: int, *_: Any) -> None:
            if step == 1 and len(began) == stop_in:
                os.kill(os.getpid(), sent)

        return train(config, on_step=on_step, **options)

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(study, "train", stopped)
    arguments, file = write(), tmp_path / "results" / "tiny.jsonl"
    assert study.main(arguments) == 128 + sent
    assert [(line["arm"], line["seed"]) for line in lines()] == ORDER[:2]
    first = file.read_bytes()

    with file.open("ab") as torn:
        torn.write(b'{"arm": "lora", "se')  # a machine that lost its power
    assert study.main(arguments) == 0
    assert began == [*ORDER[:3], *ORDER[2:]]
    assert [(line["arm"], line["seed"]) for line in lines()] == ORDER
    assert file.read_bytes().startswith(first)
    assert list((tmp_path / "scratch").iterdir()) == []

    assert study.main(arguments) == 0
    assert len(began) == 5


@pytest.mark.slow
def test_a_run_is_as_if_it_were_alone(
    study: ModuleType, write: Callable[..., list[str]], lines: Callable[[], list[dict[str, Any]]], tmp_path: Path
) -> None:
    assert study.main(write(seeds=[1])) == 0  # one arm after the other
    for line in lines():
        alone = tmp_path / f"alone-{line['arm']}-{line['seed']}"
        train(TrainConfig(**line["settings"], seed=line["seed"], output_dir=str(alone)))
        expected = read_lines(alone / "evaluations.jsonl")
        assert [found["step"] for found in line["evaluations"]] == [0, 2, 4]
        assert [found["kl"] for found in line["evaluations"]] == [found["kl_base"] for found in expected]
        assert line["evaluations"][-1]["kl"] > 0
        for found, whole in zip(line["evaluations"], expected, strict=True):
            assert found["correct"] == "".join("01"[right] for right in whole["correct"])
            assert {name: prior["accuracy"] for name, prior in found["prior"].items()} == {
                name: prior["accuracy"] for name, prior in whole["prior"].items()
            }
        metrics = read_lines(alone / "metrics.jsonl")[-1]
        assert line["metrics"]["loss"] == metrics["loss"]
        assert line["metrics"]["grad_norm"] == metrics["grad_norm"]
        assert 0 < line["seconds"]["steps"] < line["seconds"]["all"]
        assert len(line["after"]["teacher"]["correct"]) == 3


def test_after_shows_the_demonstration(
    study: ModuleType,
    write: Callable[..., list[str]],
    lines: Callable[[], list[dict[str, Any]]],
    load: Callable[..., LoadedModel],
    write_rows: Callable[..., Path],
) -> None:
    base = load(ends=ENDS, layers=1)
    bare = [{"role": "user", "content": "a?"}]
    shown = [*bare, {"role": "assistant", "content": "b"}, *bare]
    replies = generate(base, [bare, shown], max_completion_length=10)
    assert replies[0] != replies[1]
    after = []
    for name, reply in zip(("bare", "shown"), replies, strict=True):
        row = {"prompt": "a?", "completion": "b", "answer": re.escape(reply.strip()), "scorer": "regex"}
        data = str(write_rows([row], name=f"{name}.jsonl"))
        after.append({"name": name, "data": data, "context": "turns"})
    assert study.main([*write(after=after, seeds=[0]), "--only", "sdft"]) == 0
    (line,) = lines()
    assert {name: found["base"] for name, found in line["after"].items()} == {"bare": 0.0, "shown": 1.0}


def test_models_part_of_the_way_are_those_that_merge_makes(
    study: ModuleType, write: Callable[..., list[str]], lines: Callable[[], list[dict[str, Any]]], tmp_path: Path
) -> None:
    assert study.main(write(arms={"sft": {"method": "sft"}}, seeds=[0], after=[], partway=[0.25, 0.5])) == 0
    (line,) = lines()
    assert [point["share"] for point in line["partway"]] == [0.5, 0.25]
    config = TrainConfig(**line["settings"], seed=0, output_dir=str(tmp_path / "alone"))
    train(config)
    base, final = config.model, str(tmp_path / "alone" / "final")
    evaluator = Evaluator(config, load_for_training(base))
    for point in line["partway"]:
        folder = str(tmp_path / f"{point['share']}")
        sd.merge(base, final, subtract=base, scale=point["share"], output_dir=folder)
        found = evaluator.measure(load_for_training(folder), "merged")
        assert point["kl"] == pytest.approx(found["kl_base"], rel=1e-4)
        assert 0 < point["kl"] < line["evaluations"][-1]["kl"]
        assert point["correct"] == "".join("01"[right] for right in found["correct"])
        assert point["step"] == 4


def test_a_line_has_the_fingerprint_of_its_anchors(
    study: ModuleType,
    write: Callable[..., list[str]],
    lines: Callable[[], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    file = tmp_path / "anchors.txt"
    file.write_text("one?\ntwo?\n", encoding="utf-8")
    arms = {"sft": {"method": "sft"}, "anchors": {"method": "sft", "anchors": str(file), "batch_size": 4}}
    assert study.main(write(arms=arms, seeds=[0, 1], after=[])) == 0
    assert ["anchor_rows" in line for line in lines()] == [False, True, False, True]
    kept = [line["anchor_rows"] for line in lines() if "anchor_rows" in line]
    assert len(set(kept)) == 1
    file.write_text("one?\ntwo?\nthree?\n", encoding="utf-8")
    (tmp_path / "results" / "tiny.jsonl").unlink()
    assert study.main(["--only", "anchors", *write(arms=arms, seeds=[0], after=[])]) == 0
    assert lines()[0]["anchor_rows"] not in kept


@pytest.mark.slow
def test_a_run_that_fails_is_a_line(
    study: ModuleType, write: Callable[..., list[str]], lines: Callable[[], list[dict[str, Any]]]
) -> None:
    arms = {"wild": {"learning_rate": 1e38, "max_skipped_steps": 2}, "sdft": {}}
    arguments = write(arms=arms, seeds=[0])
    assert study.main(arguments) == 3
    assert ["failed" in line for line in lines()] == [True, False]
    assert lines()[0]["failed"].startswith("RunFailed: /run: 2 consecutive steps were skipped")
    assert study.main(arguments) == 0  # neither is run again
    assert len(lines()) == 2


def test_an_error_without_a_message_is_a_line(
    study: ModuleType,
    write: Callable[..., list[str]],
    lines: Callable[[], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(study, "train", fail)
    assert study.main(write(arms={"sdft": {}}, seeds=[0], after=[])) == 3
    assert [line["failed"] for line in lines()] == ["MemoryError: no message"]


@pytest.mark.slow
def test_no_run_begins_that_would_end_too_late(
    study: ModuleType,
    write: Callable[..., list[str]],
    lines: Callable[[], list[dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = write(after=[])
    assert study.main(["--minutes", "0", *arguments]) == 0
    assert lines() == []
    assert study.main(["--minutes", "10", "--only", "lora", *arguments]) == 0
    assert [(line["arm"], line["seed"]) for line in lines()] == [("lora", 0), ("lora", 1)]
    slow = [
        line | {"seconds": {"steps": 1.0, "all": seconds}} for line, seconds in zip(lines(), (500, 900), strict=True)
    ]
    (tmp_path / "results" / "tiny.jsonl").write_text("".join(json.dumps(line) + "\n" for line in slow))
    assert study.main(["--minutes", "11", *arguments]) == 0  # the mean is 700 seconds
    assert len(lines()) == 2
    assert "no time left for another run; the next is tiny, sdft, seed 0" in capsys.readouterr().err
    assert study.main(["--minutes", "12", *arguments]) == 0
    assert len(lines()) == 4


# --- study files ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arms": {"a": {"max_stepz": 3}}}, "arm 'a': unknown setting 'max_stepz'"),
        ({"arms": {"a": {"output_dir": "x"}}}, "arm 'a': setting 'output_dir' is not for a study file"),
        ({"arms": {"a": {"context": "auto"}}}, "arm 'a': setting 'context': name one"),
        ({"arms": {"a": {"prior": None}}}, "arm 'a': setting 'prior' is required"),
        ({"seed": [0]}, "unknown setting 'seed'; did you mean seeds?"),
        ({"arms": {"a": {"method": "sft", "max_completion_length": 2}}}, "raise max_completion_length"),
        ({"partway": [0.5]}, "arm 'lora': 'partway' needs full fine-tuning; setting 'lora_rank' is 2"),
        ({"arms": {"a": {}}, "partway": [1.0]}, "'partway' has 1.0, expected shares between 0 and 1"),
        ({"nearest": ["soft"]}, "'nearest' names 'soft', which is no prior file"),
    ],
)
def test_a_mistake_in_a_study_file_is_named(
    values: dict[str, Any],
    message: str,
    study: ModuleType,
    write: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    lines: Callable[[], list[dict[str, Any]]],
) -> None:
    assert study.main(write(**values)) == 2
    assert message in capsys.readouterr().err
    assert lines() == []


def test_files_of_the_package_are_named_without_a_path(
    study: ModuleType, write: Callable[..., list[str]], lines: Callable[[], list[dict[str, Any]]]
) -> None:
    arms = {"sft": {"method": "sft", "data": "bundled:routing.train.jsonl", "max_completion_length": 20}}
    assert study.main(write(arms=arms, seeds=[0], after=[])) == 0
    (line,) = lines()
    assert line["settings"]["data"] == "bundled:routing.train.jsonl"
    assert line["metrics"]["step"] == 4


def test_bf16_is_forced_and_not_part_of_what_a_run_is(study: ModuleType, write: Callable[..., list[str]]) -> None:
    (first, *_) = study.chosen(study.read_studies([Path(write()[-1])]), [])
    assert (first.config("run").mixed_precision, first.config("run", "bf16").mixed_precision) == ("no", "bf16")
    assert first.settings["mixed_precision"] == "no"


def test_the_studies_of_skills_are_accepted(study: ModuleType) -> None:
    studies = ROOT / "configs" / "study"
    files = [file for folder in ("anchors", "methods", "partway") for file in (studies / folder).glob("*.yaml")]
    assert len(files) > 6
    for one in study.read_studies(files):
        for asked in study.chosen([one], []):
            config = asked.config("run")
            assert config.test
            assert config.prior
            assert all(Path(path).exists() for path in (config.data, config.test, config.prior))
        assert all(Path(study.resolved(after.data)).is_file() for after in one.after)


def test_the_worse_model_of_t3s_is_a_checkpoint_of_the_sft_beside_it(study: ModuleType) -> None:
    file = ROOT / "configs" / "study" / "methods" / "t3s.yaml"
    comment = "\n".join(line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    written = re.search(r"^selfdistill (train (?:.*\\\n)+.*)", comment, re.MULTILINE)
    assert written
    _, given = parse(shlex.split(written[1].replace("\\\n", " ")))
    other = {"test", "prior", "eval_steps", "drift_steps", "logging_steps", "save_steps", "view_rows", "output_dir"}
    other |= {"context"}  # SFT has none
    first = TrainConfig(**given | {"data": study.resolved(given["data"])})
    runs = [asked.config("run") for asked in study.chosen(study.read_studies([file]), ["sft"])]
    assert [run.model_dump(exclude=other) for run in runs] == [first.model_dump(exclude=other)]


def test_only_studies_with_narrow_anchors_have_columns_of_nearest_kinds(study: ModuleType) -> None:
    """Elsewhere anchors are of all kinds or there are none, so no prior kind is farther from them than another."""
    studies = study.read_studies(sorted((ROOT / "configs" / "study").glob("*/*.yaml")))
    for one in studies:
        sources = [source for run in study.chosen([one], []) for source in run.config("run").anchors]
        assert bool(one.nearest) == any(":" in source for source in sources), one.name
    assert [one.name for one in studies if one.nearest] == ["facts", "routing", "tools"]


def opening(row: Demonstration) -> tuple[str, ...]:
    return tuple(row.prompt[-1]["content"].lower().split()[:3])


def test_the_nearest_prior_questions_begin_most_often_like_narrow_anchors_and_are_of_no_kind_of_theirs(
    study: ModuleType,
) -> None:
    """Of the questions of each kind, the share whose first three words are those of a narrow anchor."""
    of_prior = {"fact", "arithmetic", "code", "example", "language", "reading"}
    for one in study.read_studies(sorted((ROOT / "configs" / "study").glob("*/*.yaml"))):
        for run in study.chosen([one], []):
            for source in filter(lambda source: ":" in source, run.config("run").anchors):
                assert not of_prior & set(anchor_kinds(source))
                near = {opening(row) for row in anchor_prompts(source)}
                files = sorted(Path(study.resolved(run.settings["prior"])).glob("*.jsonl"))
                like = {f.stem: mean(opening(row) in near for row in load_demonstrations(f)) for f in files}
                assert min(like.pop(name) for name in one.nearest) > max(like.values())


# --- the table ---


def made(arm: str, seed: int, new: float, prior: float, kl: float, teacher: float, **other: Any) -> dict[str, Any]:
    """A line with the base and two evaluations; ``hard`` is always 0.5 below ``easy``."""

    def at(step: int, new: float, prior: float, kl: float) -> dict[str, Any]:
        kinds = {"easy": {"accuracy": prior + 0.25}, "hard": {"accuracy": prior - 0.25}}
        return {"step": step, "accuracy": new, "prior": kinds, "kl": kl, "seconds": 30.0 * step}

    return {
        "arm": arm,
        "seed": seed,
        "evaluations": [at(0, 0.0, 0.75, 0.0), at(2, new / 2, prior, kl), at(4, new, prior, kl)],
        "after": {"teacher": {"accuracy": teacher, "base": 1.0}},
        "where": {
            "device": "a CPU",
            "threads": 2,
            "precision": "float32",
            "torch": "2",
            "transformers": "5",
            "selfdistill": "1",
            "rows": "abc",
            "date": f"2026-01-0{seed + 1}",
        },
    } | other


@pytest.fixture
def summary(
    study: ModuleType, write: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[dict[str, Any]]], list[str]]:
    """The summary of lines, of the settings that the study asks for unless they have their own."""
    arguments = write()
    asked = {run.arm: run.settings for run in study.chosen(study.read_studies([Path(arguments[-1])]), [])}

    def of(lines: list[dict[str, Any]]) -> list[str]:
        (tmp_path / "results").mkdir(exist_ok=True)
        text = "".join(json.dumps({"settings": asked[line["arm"]]} | line) + "\n" for line in lines)
        (tmp_path / "results" / "tiny.jsonl").write_text(text)
        assert study.main(["--summary", *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    return of


def test_means_and_intervals_are_those_worked_out_by_hand(summary: Callable[[list[dict[str, Any]]], list[str]]) -> None:
    """Two seeds: half the interval is t = 12.7062 times half of the difference."""
    said = summary(
        [
            made("lora", 0, 0.5, 0.5, 0.99, 0.75),
            made("lora", 1, 0.52, 0.51, 1.01, 0.75),
            made("sdft", 0, 1.0, 0.75, 0.1, 1.0),
        ]
    )
    half = 12.7062 * 0.01
    assert said == [
        "## tiny",
        "",
        "| arm | steps | seeds | new | prior | nearest | far | easy | hard | KL | teacher | minutes | where |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| base | 0 |  | 0.000 | 0.750 | 1.000 | 0.500 | 1.000 | 0.500 | 0.000 | 1.000 |  | A |",
        "| lora | 2 | 2 | 0.255 (0.19 to 0.32) | 0.505 (0.44 to 0.57) | 0.755 (0.69 to 0.82) | 0.255 (0.19 to 0.32) "
        f"| 0.755 (0.69 to 0.82) | 0.255 (0.19 to 0.32) | 1.000 ({1 - half:.2f} to {1 + half:.2f}) |  | 1.0 | A |",
        "| lora | 4 | 2 | 0.510 (0.38 to 0.64) | 0.505 (0.44 to 0.57) | 0.755 (0.69 to 0.82) | 0.255 (0.19 to 0.32) "
        f"| 0.755 (0.69 to 0.82) | 0.255 (0.19 to 0.32) | 1.000 ({1 - half:.2f} to {1 + half:.2f}) "
        "| 0.750 | 2.0 | A |",
        "| sdft | 2 | 1 | 0.500 | 0.750 | 1.000 | 0.500 | 1.000 | 0.500 | 0.100 |  | 1.0 | A |",
        "| sdft | 4 | 1 | 1.000 | 0.750 | 1.000 | 0.500 | 1.000 | 0.500 | 0.100 | 1.000 | 2.0 | A |",
        "",
        "- A: a CPU, 2 threads, float32, torch 2, transformers 5, selfdistill 1, rows abc: 3 runs, 2026-01-01 to "
        "2026-01-02",
        "- not yet run: 1 of 4 runs",
        "",
    ]


def test_models_part_of_the_way_have_rows(summary: Callable[[list[dict[str, Any]]], list[str]]) -> None:
    whole = made("sdft", 0, 1.0, 0.5, 0.5, 1.0)
    half = {"share": 0.5, **made("sdft", 0, 0.75, 0.625, 0.125, 1.0)["evaluations"][-1]}
    *_, final, partway, _, _, _, _ = summary([whole | {"partway": [half]}])
    assert final.startswith("| sdft | 4 | 1 | 1.000 | 0.500 |")
    assert partway == (
        "| sdft, 50% of the way | 4 | 1 | 0.750 | 0.625 | 0.875 | 0.375 | 0.875 | 0.375 | 0.125 |  | 2.0 | A |"
    )


def test_models_part_of_the_way_are_averaged_by_their_share(
    summary: Callable[[list[dict[str, Any]]], list[str]],
) -> None:
    """The study file had fewer shares when the first line was made, and other runs had none."""

    def with_shares(seed: int, **new: float) -> dict[str, Any]:
        ends = {share: made("sdft", seed, score, 0.5, 0.1, 1.0)["evaluations"][-1] for share, score in new.items()}
        points = [{"share": int(share[1:]) / 100} | end for share, end in ends.items()]
        return made("sdft", seed, 1.0, 0.5, 0.1, 1.0) | ({"partway": points} if points else {})

    said = summary([with_shares(0, p50=0.25), with_shares(1, p75=0.75, p50=0.5), made("lora", 0, 1, 0, 1, 1)])
    cells = [line.split(" | ") for line in said if "of the way" in line]
    assert [[own[0], own[2], own[3][:5]] for own in cells] == [
        ["| sdft, 75% of the way", "1", "0.750"],
        ["| sdft, 50% of the way", "2", "0.375"],
    ]


def elsewhere(line: dict[str, Any], **where: Any) -> dict[str, Any]:
    return line | {"where": line["where"] | where}


def test_a_mean_over_machines_is_named(summary: Callable[[list[dict[str, Any]]], list[str]]) -> None:
    other = elsewhere(made("lora", 1, 0.5, 0.5, 1.0, 1.0), device="a GPU", precision="bfloat16")
    said = summary([made("lora", 0, 0.5, 0.5, 1.0, 1.0), other, made("sdft", 0, 0.5, 0.5, 1.0, 1.0)])
    assert [line.rsplit("| ", 2)[-2:] for line in said if line.startswith("| lora | 4")] == [[" ", "A B |"]]
    assert [line.rsplit("| ", 2)[-2:] for line in said if line.startswith("| sdft | 4")] == [["2.0 ", "A |"]]
    assert [line[-4:] for line in said if line.startswith("| base")] == [" A |", " B |"]
    assert any(line.startswith("- B: a GPU, 2 threads, bfloat16") for line in said)
    assert "- **Means over several machines, precisions or versions**: lora" in said


def test_anchors_that_changed_between_runs_are_named(
    summary: Callable[[list[dict[str, Any]]], list[str]],
) -> None:
    old, new = (made("lora", seed, 0.5, 0.5, 1.0, 1.0) | {"anchor_rows": rows} for seed, rows in enumerate("ab"))
    note = "- **Anchors changed between the runs of**: lora"
    assert note in summary([old, new, made("sdft", 0, 0.5, 0.5, 1.0, 1.0) | {"anchor_rows": "a"}])
    assert note not in summary([old, new | {"anchor_rows": "a"}])


def test_a_seed_run_on_two_machines_counts_once_in_each_mean(
    summary: Callable[[list[dict[str, Any]]], list[str]],
) -> None:
    first = [made("lora", 0, 0.5, 0.5, 1.0, 1.0), made("lora", 1, 0.5, 0.5, 1.0, 1.0)]
    said = summary([*first, first[0], elsewhere(made("lora", 0, 0.9, 0.5, 1.0, 1.0), torch="3")])
    rows = [line.split(" | ")[2:4] for line in said if line.startswith("| lora | 4")]
    assert rows == [["2", "0.500"], ["1", "0.900"]]
    assert "- **Rows come from several machines, precisions or versions**: compare within one letter" in said


def test_runs_of_other_settings_are_left_out_and_failures_named(
    summary: Callable[[list[dict[str, Any]]], list[str]],
) -> None:
    said = summary(
        [
            made("lora", 0, 0.5, 0.5, 1.0, 1.0),
            made("lora", 1, 0.9, 0.5, 1.0, 1.0, settings={"method": "dft"}),
            {"arm": "sdft", "seed": 1, "failed": "RunFailed: no", "where": made("sdft", 1, 0, 0, 0, 0)["where"]},
        ]
    )
    assert [line.split(" | ")[2:4] for line in said if line.startswith("| lora | 4")] == [["1", "0.500"]]
    assert said[-4:-1] == [
        "- failed: sdft, seed 1: RunFailed: no",
        "- not yet run: 2 of 4 runs",
        "- left out: 1 line of other settings",
    ]


def test_a_failure_that_a_later_run_made_good_is_not_named(
    summary: Callable[[list[dict[str, Any]]], list[str]],
) -> None:
    where = made("sdft", 0, 0, 0, 0, 0)["where"]
    failed = {"arm": "sdft", "seed": 0, "failed": "RunFailed: no", "where": where}
    said = summary([failed, made("sdft", 0, 0.75, 0.5, 1.0, 1.0)])
    assert [line.split(" | ")[2:4] for line in said if line.startswith("| sdft | 4")] == [["1", "0.750"]]
    assert not any("failed" in line for line in said)


def test_differences_are_paired_by_seed_and_place(
    study: ModuleType, write: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """sdft minus sft: .10 and .14 of the prior (half: 12.7062 * .02), whatever the seeds' own levels."""
    arms = {"sft": {"method": "sft", "learning_rate": 1e-3}, "sdft": {}, "lora": {"method": "sft", "lora_rank": 2}}
    arguments = write(arms=arms)
    asked = {run.arm: run.settings for run in study.chosen(study.read_studies([Path(arguments[-1])]), [])}
    ends = {("sft", 0): 0.3, ("sdft", 0): 0.4, ("sft", 1): 0.5, ("sdft", 1): 0.64, ("lora", 0): 0.3, ("lora", 1): 0.3}
    lines = [made(arm, seed, 0.5, prior, 1.0, 1.0) for (arm, seed), prior in ends.items()]
    lines += [elsewhere(made("sdft", 0, 0.5, 0.9, 1.0, 1.0), torch="3")]  # no partner there
    (tmp_path / "results").mkdir()
    text = "".join(json.dumps({"settings": asked[line["arm"]]} | line) + "\n" for line in lines)
    (tmp_path / "results" / "tiny.jsonl").write_text(text)
    assert study.main(["--summary", *arguments]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if " minus " in line]
    interval = "+0.120 (-0.134 to +0.374)"
    scores = f"new +0.000, prior {interval}, nearest {interval}, far {interval}"
    assert said == [f"- sdft minus sft, 2 seeds: {scores}"]


def test_anchors_of_some_kinds_are_those_of_the_package(study: ModuleType) -> None:
    assert study.resolved("kinds:list+code") == "package:list+code"


def test_the_figure_shows_where_the_arms_of_several_studies_ended(
    study: ModuleType, write: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, said, more = study.draw, [], tmp_path / "more.yaml"
    monkeypatch.setattr(study, "draw", lambda *given: said.append(draw(*given)))
    first = Path(write(name="more", arms={"dft": {"method": "dft"}})[-1]).rename(more)
    arguments = write()
    ends = [("sdft", 0, 1.0, 0.75), ("sdft", 1, 0.875, 0.5), ("dft", 0, 0.5, 0.25)]
    ends.insert(1, ends[0])  # seed 0 on another machine, too
    (tmp_path / "results").mkdir()
    for run in study.chosen(study.read_studies([first, Path(arguments[-1])]), []):
        for number, end in enumerate(ends):
            if end[:2] == (run.arm, run.seed):
                line = made(*end, kl=0.1, teacher=1.0, settings=run.settings)
                line["evaluations"][0]["accuracy"] = 0.125 if number == 1 else 0.0
                study.append(tmp_path / "results" / f"{run.study.name}.jsonl", line)
    assert study.main(["--figure", str(tmp_path / "end.svg"), *arguments, str(more)]) == 0
    (drawn,) = said
    assert "sdft: (0.625, 0.938). dft: (0.25, 0.5). Base at (0.75, 0) and (0.75, 0.125)." in drawn
    assert "lora" not in drawn
    assert (tmp_path / "end.svg").is_file()


def test_a_figure_of_one_arm_in_two_studies_is_refused(
    study: ModuleType, write: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = Path(write(name="more", arms={"sdft": {"max_steps": 2}})[-1]).rename(tmp_path / "more.yaml")
    assert study.main(["--figure", str(tmp_path / "end.svg"), *write(), str(more)]) == 2
    said = "arm 'sdft' is in several studies, tiny and more; draw one of them at a time"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "end.svg").exists()


def test_a_figure_of_two_tests_is_refused(
    study: ModuleType, write: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = write(arms={"sft": {"method": "sft"}, "other": {"method": "sft", "test": "another.jsonl"}})
    assert study.main(["--figure", str(tmp_path / "end.svg"), *arguments]) == 2
    assert "the figure's runs have several values of 'test': " in capsys.readouterr().err
    assert not (tmp_path / "end.svg").exists()
