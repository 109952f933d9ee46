"""The study's settings: each file is one that the command it names accepts, of files that exist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfdistill.comparison.compare import compare
from selfdistill.comparison.kinds import runs_of
from selfdistill.config.commands import CompareConfig, EvalConfig
from selfdistill.config.files import continued, load_yaml
from selfdistill.config.train import TrainConfig
from selfdistill.data.contexts import parse_context
from selfdistill.data.demonstrations import load_demonstrations
from selfdistill.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs" / "study").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_of_the_study_is_accepted_by_its_command(file: Path) -> None:
    _, command, option, path, *more = file.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ").split()
    assert (option, path) == ("--config", f"configs/study/{file.name}")
    assert [f"--{word[2:]}" for word in more if word.startswith("--")] == more[::2]
    kind = {"compare": CompareConfig, "eval": EvalConfig}[command]
    config = kind(**load_yaml(file, kind))
    for path in (config.data, config.prior, *((config.test,) if isinstance(config, CompareConfig) else ())):
        assert path is None or (ROOT / path).is_file()
    if isinstance(config, CompareConfig):
        for context in config.vary.get("context", [config.context]):
            assert context == "auto" or parse_context(context)


def test_there_are_files() -> None:
    assert len(FILES) >= 11


@pytest.mark.parametrize("skill", ["routing", "tools", "knowledge"])
def test_the_skills_of_the_package_have_a_test_that_is_not_learnt(skill: str) -> None:
    train, test = (
        load_demonstrations(str(ROOT / f"selfdistill/data/bundled/{skill}.{part}.jsonl")) for part in ("train", "test")
    )
    prompts = [row.prompt[-1]["content"] for row in (*train, *test)]
    assert len(set(prompts)) == len(prompts)


@pytest.fixture
def settings(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> Callable[..., CompareConfig]:
    """Two steps of one method and one seed on tiny models."""

    def make(**values: Any) -> CompareConfig:
        defaults: dict[str, Any] = {
            "model": str(model_folder(layers=1)),
            "data": str(write_rows()),
            "test": str(write_rows(count=2, name="test.jsonl")),
            "output_dir": str(tmp_path / "comparison"),
            "methods": ["sdft"],
            "seeds": [0],
            "learning_rates": [1e-3],
            "context": "turns",
            "max_completion_length": 10,
            "batch_size": 2,
            "max_steps": 2,
            "drift_steps": 0,
            "view_rows": 0,
            "mixed_precision": "no",
        }
        return CompareConfig(**(defaults | values))

    return make


def test_a_setting_is_varied(settings: Callable[..., CompareConfig], tmp_path: Path) -> None:
    result = compare(settings(vary={"teacher": ["ema", "frozen"]})).details
    assert [run["method"] for run in result["runs"]] == ["sdft teacher=ema", "sdft teacher=frozen"]
    assert [run["folder"] for run in result["runs"]] == [
        "sdft-teacher_ema-0.001-seed0",
        "sdft-teacher_frozen-0.001-seed0",
    ]
    assert "sdft teacher=frozen" in result["sentence"]
    texts = [(tmp_path / "comparison" / run["folder"] / "config.yaml").read_text() for run in result["runs"]]
    assert ["teacher: ema" in text for text in texts] == [True, False]


@pytest.mark.slow
def test_what_a_method_does_not_use_makes_no_further_run_of_it(settings: Callable[..., CompareConfig]) -> None:
    result = compare(settings(methods=["sft", "sdft"], vary={"teacher": ["frozen", "live"]})).details
    assert [run["method"] for run in result["runs"]] == ["sft", "sdft teacher=frozen", "sdft teacher=live"]
    assert "sdft teacher=frozen ends at" in result["sentence"]


@pytest.mark.parametrize(
    ("method", "vary"),
    [
        ("sft", {"teacher": ["ema", "frozen"]}),
        ("sft", {"divergence": ["forward_kl", "jsd"]}),
        ("grpo", {"cold_start_steps": [0, 2]}),
        ("offline_distillation", {"teacher": ["ema", "frozen"]}),
        ("sft_reinvoke", {"teacher": ["frozen", "ema"]}),
    ],
)
def test_a_default_that_a_method_does_not_use_makes_no_further_run_either(
    settings: Callable[..., CompareConfig], method: str, vary: dict[str, Any]
) -> None:
    config = settings(methods=[method], vary=vary)
    assert [(label, Path(run.output_dir).name) for label, run in runs_of(config)] == [(method, f"{method}-0.001-seed0")]


@pytest.mark.slow
def test_varied_contexts_have_no_common_teacher(
    settings: Callable[..., CompareConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    result = compare(settings(context="auto", vary={"context": ["turns", "turns:repeats=2"]})).details
    assert result["teacher"] is None
    assert "layout" not in capsys.readouterr().err
    assert [run["method"] for run in result["runs"]] == ["sdft context=turns", "sdft context=turns:repeats=2"]


@pytest.mark.slow
def test_other_values_do_not_take_the_runs_of_the_first(settings: Callable[..., CompareConfig]) -> None:
    compare(settings(vary={"num_generations": [1]}))
    result = compare(settings(vary={"num_generations": [2]}), resume=True).details
    folders = [f"sdft-num_generations_{count}-0.001-seed0" for count in (1, 2)]
    assert [run["folder"] for run in result["runs"]] == folders
    with pytest.raises(UserError, match=r"temperature was 1\.0 and is now 0\.5"):
        compare(settings(vary={"num_generations": [2]}, temperature=0.5), resume=True)


@pytest.mark.slow
def test_the_number_of_demonstrations_is_varied(settings: Callable[..., CompareConfig], tmp_path: Path) -> None:
    compare(settings(vary={"num_demonstrations": [2, 4]}))
    cards = [file.read_text() for file in sorted((tmp_path / "comparison").glob("*/final/README.md"))]
    assert ["2 demonstrations" in card for card in cards] == [True, False]
    assert ["4 demonstrations" in card for card in cards] == [False, True]


def test_arms_have_settings_of_their_own(settings: Callable[..., CompareConfig], tmp_path: Path) -> None:
    file = tmp_path / "arms.yaml"
    file.write_text(
        "sdft: {method: sdft}\n"
        "gentle, half: {method: isdft, method_settings: {share: 0.5}}\n"
        "sft: {method: sft, learning_rate: 0.01}\n"
    )
    config = settings(methods=("sft", "sdft"), arms=str(file))
    assert config == settings(methods=("sft", "sdft"), arms=config.arms)
    result = compare(config).details
    assert [run["method"] for run in result["runs"]] == ["sdft", "gentle, half", "sft"]
    folders = ["sdft-0.001-seed0", "gentle, half-0.001-seed0", "sft-seed0"]
    assert [run["folder"] for run in result["runs"]] == folders
    assert [run["learning_rate"] for run in result["runs"]] == [1e-3, 1e-3, 1e-2]
    sentence = result["sentence"]
    assert "At learning rate 0.001 sdft ends at" in sentence
    assert "on the new task, gentle, half at" in sentence
    assert "on the new task, at learning rate 0.01 sft at" in sentence
    saved = load_yaml(tmp_path / "comparison" / folders[1] / "config.yaml", TrainConfig)
    assert (saved["method"], saved["method_settings"]) == ("isdft", {"share": 0.5})
    file.write_text("sdft: {method: sdft}\nfull: {method: isdft}\n")
    more = continued({"output_dir": config.output_dir, "arms": str(file)}, CompareConfig)
    names = [run["method"] for run in compare(more, resume=True).details["runs"]]
    assert names == ["sdft", "gentle, half", "sft", "full"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arms": {"a": {"model": "m"}}}, "setting 'arms', 'a': 'model' cannot differ"),
        ({"arms": {"a": {"methd": "sft"}}}, "setting 'arms', 'a': 'methd' cannot differ; did you mean method?"),
        ({"arms": {" ": {}}}, "setting 'arms': found an arm without a name"),
        (
            {"arms": {"a": {}}, "vary": {"teacher": ["ema"]}},
            "setting 'arms' names the runs: leave 'methods' and 'vary'",
        ),
        ({"arms": {"a": {}}, "methods": ["sft"]}, "setting 'arms' names the runs: leave 'methods' and 'vary' out"),
        ({"arms": "none.yaml"}, "none.yaml: cannot read the settings: No such file or directory"),
        ({"arms": {"a": 3}}, "setting 'arms.a': found 3, expected: an object"),
        (
            {"arms": {"a": {"method": "sft", "teacher": "live"}}},
            "arm 'a': setting 'teacher': method 'sft' does not use",
        ),
        (
            {"arms": {"a": {"method_settings": {"pull": 1}}}},
            "arm 'a': setting 'method_settings': method 'sdft' does not use it",
        ),
        ({"arms": {"a": {"teacher": "best"}}}, "arm 'a': setting 'teacher': found 'best'"),
    ],
)
def test_arms_that_cannot_be_run(settings: Callable[..., CompareConfig], values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        compare(settings(**{"methods": ("sft", "sdft")} | values))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ({"teachr": ["ema"]}, "setting 'vary': 'teachr' cannot be varied; did you mean teacher?"),
        ({"model": ["a"]}, "setting 'vary': 'model' cannot be varied"),
        ({"environment": ["none", "bundled:shop"]}, "setting 'vary': 'environment' cannot be varied"),
        ({"num_train_epochs": [1, 4]}, "setting 'vary': 'num_train_epochs' cannot be varied"),
        ({"teacher": []}, "setting 'vary': expected one setting with at least one value"),
        ({"teacher": ["ema"], "top_k": [1]}, "setting 'vary': expected one setting with at least one value"),
    ],
)
def test_what_cannot_be_varied(settings: Callable[..., CompareConfig], vary: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        settings(vary=vary)
    assert str(error.value).startswith(message)


def test_a_value_that_is_none_is_named(settings: Callable[..., CompareConfig]) -> None:
    with pytest.raises(UserError, match="setting 'teacher': found 'best'"):
        compare(settings(vary={"teacher": ["best"]}))
