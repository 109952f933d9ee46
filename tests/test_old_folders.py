"""What release 0.1.0 wrote still works: runs resume to its weights, states and comparisons go on, options are known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfdistill.cli import main
from selfdistill.cli_parser import COMMANDS

WRITTEN = Path(__file__).parent / "written_by_0_1"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copied = tmp_path / "written"
    shutil.copytree(WRITTEN, copied)
    monkeypatch.chdir(copied)
    return copied


def assert_close(found: Path, expected: Path) -> None:
    a, b = load_file(found), load_file(expected)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-5), name


@pytest.mark.parametrize(("run", "file"), [("sdft", "model.safetensors"), ("lora", "adapter_model.safetensors")])
def test_a_run_resumes_to_the_weights_it_had(run: str, file: str) -> None:
    shutil.rmtree(f"{run}/checkpoint-00000006")
    shutil.rmtree(f"{run}/final")
    before = (WRITTEN / run / "metrics.jsonl").read_text().splitlines()
    assert main(["train", "--output_dir", run, "--resume"]) == 0
    assert_close(Path(run, "final", file), WRITTEN / run / "final" / file)
    after = Path(run, "metrics.jsonl").read_text().splitlines()
    assert after[:3] == before[:3]
    assert json.loads(after[5])["loss"] == pytest.approx(json.loads(before[5])["loss"], abs=1e-5)


def test_a_config_file_runs_again_to_the_same_weights() -> None:
    assert main(["train", "--config", "sdft/config.yaml", "--output_dir", "again"]) == 0
    assert_close(Path("again/final/model.safetensors"), WRITTEN / "sdft/final/model.safetensors")


def test_a_state_of_skills_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learn", "--state", "memory", "status"]) == 0
    assert "train" in capsys.readouterr().out
    assert main(["learn", "--state", "memory", "rollback"]) == 0
    assert main(["learn", "--state", "memory", "history", "--json", "history.json"]) == 0
    assert [line["place"] for line in json.loads(Path("history.json").read_text())["history"]] == ["undone/0001-train"]


def test_an_interrupted_skill_goes_on_with_the_same_command() -> None:
    options = "--model model --test second.jsonl --max_steps 60 --min_teacher 0 --max_prior_drop 1 --max_skill_drop 1 "
    options += "--learning_rate 1e-3 --context turns --max_completion_length 10 --batch_size 2 --warmup_steps 0 "
    options += "--mixed_precision no --drift_steps 0 --view_rows 1 --save_steps 0"
    assert main(["learn", "--state", "pending", "add", "second.jsonl", *options.split()]) == 0
    assert not Path("pending/pending").exists()
    assert sorted(path.name for path in Path("pending/skills").iterdir()) == ["0001-train", "0002-second"]
    lines = Path("pending/skills/0002-second/run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 61))


def test_a_comparison_takes_more_seeds() -> None:
    assert main(["compare", "--output_dir", "compare", "--resume", "--seeds", "0,1", "--json", "found.json"]) == 0
    found = json.loads(Path("found.json").read_text())
    old = json.loads((WRITTEN / "compare" / "comparison.json").read_text())
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    assert found["runs"][0] == old["runs"][0]


def test_what_was_written_is_read_by_report_eval_and_export() -> None:
    assert main(["report", "sdft", "lora", "compare", "-o", "report.html"]) == 0
    assert main(["eval", "--model", "lora", "--data", "train.jsonl", "--max_completion_length", "4"]) == 0
    assert main(["export", "lora", "--output_dir", "merged", "--merge", "true"]) == 0


def test_every_option_is_still_known() -> None:
    for command, names in json.loads((WRITTEN / "options.json").read_text()).items():
        assert set(names) <= set(COMMANDS[command][0].model_fields), command
