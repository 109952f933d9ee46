"""lm-eval as a source of prior abilities: the same numbers as our own scorer, and nothing else changed by it."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from selfdistill.config.commands import EvalConfig
from selfdistill.data.chat_format import ChatFormat
from selfdistill.errors import UserError
from selfdistill.evaluation.lmeval import TaskResult, lm_eval_abilities
from selfdistill.evaluation.priors import encode_priors, load_prior, prior_abilities
from selfdistill.model.device import any_length
from selfdistill.model.forward import ForwardPass
from selfdistill.model.loading import LoadedModel, load_model

pytest.importorskip("lm_eval", reason="LM-EVAL NOT CHECKED: pip install 'selfdistill[lm-eval]'")

PRIOR = Path(__file__).resolve().parents[3] / "shared" / "data" / "prior"
QUESTIONS = [
    {"query": "Question: What floats?", "choices": ["wood", "a stone of lead"], "gold": 0},
    {"query": "He opened the door, because", "choices": ["it rang.", "he was asleep in bed."], "gold": 1},
    {"query": "Kill flies.\n", "choices": ["Swat them.", "Sing to them softly."], "gold": 0},
    {"query": "Zu Fuß über die", "choices": ["Brücke", "längste Straße der Welt"], "gold": 0},
]


@pytest.fixture(scope="module", autouse=True)
def own_tasks_only() -> Iterator[None]:
    """lm-eval reads thousands of task files of its own in every TaskManager; names of the tests are not among them."""
    from lm_eval import tasks

    patch = pytest.MonkeyPatch()
    real = tasks.TaskManager
    patch.setattr(tasks, "TaskManager", lambda include_path: real(include_path=include_path, include_defaults=False))
    yield
    patch.undo()


@pytest.fixture
def write_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a task file over rows; returns its folder."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name: str, rows: list[dict[str, Any]], **settings: Any) -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            # Context and continuation as in selfdistill.evaluation.priors.
            "doc_to_text": "{% set q = query.rstrip() %}{{ q }}{% if q.startswith('Question:') %}\nAnswer:{% endif %}",
            "doc_to_choice": "{{ choices }}",
            "doc_to_target": "gold",
            "target_delimiter": " ",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | settings), encoding="utf-8")
        return folder

    return write


def measure(loaded: LoadedModel, tasks: list[str], folder: Path | None, limit: int | None = None) -> list[TaskResult]:
    return lm_eval_abilities(
        loaded, tasks, include_path=None if folder is None else str(folder), limit=limit, batch_size=4
    )


def ours(loaded: LoadedModel, path: Path) -> Any:
    chat = ChatFormat(loaded.tokenizer, loaded.end_token_ids, {})
    encoded = encode_priors(loaded, chat, load_prior(str(path)))
    return prior_abilities(loaded, ForwardPass(loaded), chat, encoded, batch_size=16, who="model")[0]


def test_accuracies_equal_those_of_our_own_scorer(
    load: Callable[..., LoadedModel], write_task: Callable[..., Path]
) -> None:
    letters = [{"query": f"Question: {letter}?", "choices": ["x", "y", "z"], "gold": 1} for letter in "abcdef"]
    folder = write_task("flies", QUESTIONS + letters)
    seen = set()
    for seed in range(4):
        loaded = load(seed=seed)
        (result,) = measure(loaded, ["flies"], folder)
        own = ours(loaded, folder / "flies.jsonl")
        assert (result.name, result.items, result.metric) == ("flies", 10, "acc,none")
        assert (result.accuracy, result.accuracy_norm) == (own.accuracy, own.accuracy_norm)
        assert result.correct == own.correct
        seen.add(tuple(result.correct))
    assert len(seen) > 1


def test_limit_groups_and_other_metrics(load: Callable[..., LoadedModel], write_task: Callable[..., Path]) -> None:
    write_task("flies", QUESTIONS)
    said = {"output_type": "generate_until", "doc_to_text": "{{ query }}", "doc_to_target": "x", "doc_to_choice": None}
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    said |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 3}, "metric_list": exact}
    folder = write_task("said", QUESTIONS, **said)
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["flies", "said"]}), encoding="utf-8")
    loaded = load()
    flies, said_result = measure(loaded, ["both"], folder, limit=3)
    assert (flies.name, flies.items, len(flies.correct)) == ("flies", 3, 3)
    assert flies.correct == measure(loaded, ["flies"], folder)[0].correct[:3]
    assert said_result == TaskResult("said", 3, 0.0, None, [False] * 3, "exact_match,none")


@pytest.mark.parametrize("bfloat16", [False, True])
def test_it_computes_in_the_precision_that_is_on(
    load: Callable[..., LoadedModel], write_task: Callable[..., Path], bfloat16: bool
) -> None:
    loaded, folder, seen = load(), write_task("flies", QUESTIONS), set()
    loaded.model.register_forward_pre_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        measure(loaded, ["flies"], folder)
    assert seen == {bfloat16}


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


@pytest.mark.usefixtures("cudnn_attention")
def test_it_uses_no_attention_of_cudnn(
    load: Callable[..., LoadedModel], write_task: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, where its passes have any length."""
    monkeypatch.setattr("selfdistill.evaluation.lmeval.any_length", lambda _: any_length("cuda"))
    loaded, folder, seen = load(), write_task("flies", QUESTIONS), set()
    loaded.model.register_forward_pre_hook(lambda *_: seen.add(torch.backends.cuda.cudnn_sdp_enabled()))
    measure(loaded, ["flies"], folder)
    assert seen == {False}


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_else_is_changed(
    load: Callable[..., LoadedModel],
    write_task: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    adapter: bool,
    fails: bool,
) -> None:
    folder = write_task("flies", QUESTIONS)
    loaded = load(tied=True)
    if adapter:
        loaded.model = get_peft_model(loaded.model, LoraConfig(target_modules="all-linear"))
    model = loaded.model
    model.train()
    next(model.children()).eval()  # neither all of them nor none
    parameters = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}

    def state() -> list[Any]:
        parts = [(name, module.training, sorted(vars(module))) for name, module in model.named_modules()]
        return [parts, model.config.to_dict(), model.generation_config.to_dict(), loaded.tokenizer.padding_side]

    before = state()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    expected = draws()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    if fails:
        monkeypatch.setattr("lm_eval.evaluator.evaluate", lambda *_, **__: (draws(), 1 / 0))
        with pytest.raises(UserError, match=r"^lm-eval: cannot run flies: ZeroDivisionError: division by zero$"):
            measure(loaded, ["flies"], folder)
    else:
        measure(loaded, ["flies"], folder)
    assert draws() == expected
    assert state() == before
    for name, parameter in model.named_parameters():
        was, required, values = parameters.pop(name)
        assert (id(parameter), parameter.requires_grad, parameter.grad) == (was, required, None)
        assert torch.equal(parameter, values)
    assert not parameters


def test_local_files_need_no_network(
    load: Callable[..., LoadedModel], write_task: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config

    asked = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load.get_session", lambda: asked.append("for a download to be counted"))
    folder = write_task("online", QUESTIONS)
    assert measure(load(), ["online"], folder, limit=1)[0].items == 1
    assert not asked
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


def test_mistakes_are_one_line(
    load: Callable[..., LoadedModel], write_task: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_task("flies", QUESTIONS)
    loaded = load()
    text = {"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_text": "", "doc_to_target": "{{ query }}"}
    metric = [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]
    write_task("texts", QUESTIONS, metric_list=metric, **text)
    write_task("loose", QUESTIONS, metric_list=[metric[0] | {"metric": "acc_norm", "aggregation": "mean"}])
    write_task("lost", QUESTIONS, dataset_kwargs={"data_files": {"test": str(folder / "none.jsonl")}})
    cases = [
        (["flis"], folder, f"lm_eval_tasks: no task 'flis' in lm-eval or {folder}; did you mean flies?"),
        (["flies"], None, "and lm_eval_path is not given; see lm-eval ls tasks"),
        (["flies"], folder / "no", f"lm_eval_path '{folder / 'no'}': no such folder"),
        (["flies", "lost"], folder, "lm_eval_tasks: task 'lost' cannot be loaded: FileNotFoundError: "),
        (
            ["texts"],
            folder,
            "lm_eval_tasks: task 'texts' measures perplexity, expected one of acc, exact_match, em that",
        ),
        (["flies", "loose"], folder, "lm_eval_tasks: task 'loose' measures acc_norm, expected one of acc, exact_match"),
    ]
    monkeypatch.setattr("lm_eval.evaluator.evaluate", lambda *_, **__: pytest.fail("something was run"))
    for tasks, path, message in cases:
        with pytest.raises(UserError) as error:
            measure(loaded, tasks, path)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(UserError, match=r"pip install 'selfdistill\[lm-eval\]'$"):
        measure(loaded, ["flies"], folder)


SCORES = """
def share(doc, results):
    return {"acc": 0.5 if doc["gold"] else 0.25}

def likeliest(doc, results):
    lengths = [value for value, _ in results]
    return {"acc": float(lengths.index(max(lengths)) == doc["gold"])}
"""


def test_a_task_with_its_own_metrics_is_tried_on_one_item(
    load: Callable[..., LoadedModel], write_task: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.evaluator

    real, seen, results = lm_eval.evaluator.evaluate, [], []

    def spy(model: Any, tasks: dict[str, Any], **settings: Any) -> Any:
        seen.append((list(tasks["tasks"]), settings["limit"]))
        results.append(real(model, tasks, **settings))
        return results[-1]

    monkeypatch.setattr("lm_eval.evaluator.evaluate", spy)
    shots = {"num_fewshot": 2, "fewshot_split": "test", "fewshot_config": {"sampler": "default"}}
    accuracy = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    folder = write_task("flies", QUESTIONS, metric_list=accuracy, **shots)
    (folder / "scores.py").write_text(SCORES, encoding="utf-8")
    for name in ("share", "likeliest"):
        write_task(name, QUESTIONS, metric_list=accuracy, **shots)
        with (folder / f"{name}.yaml").open("a", encoding="utf-8") as file:
            file.write(f"process_results: !function scores.{name}\n")
    loaded = load()
    with pytest.raises(
        UserError, match=r"task 'share' measures acc, expected .* that is 0 or 1 per item; leave it out"
    ):
        measure(loaded, ["flies", "share"], folder)
    assert seen.pop() == (["share"], 1)
    flies, likeliest = measure(loaded, ["flies", "likeliest"], folder)
    assert seen == [(["likeliest"], 1), (["flies", "likeliest"], None)]
    assert likeliest.correct == flies.correct
    prompts = [[item["arguments"] for item in samples] for samples in results[-1]["samples"].values()]
    assert prompts[0] == prompts[1]  # the trial has used up no few-shot examples


def test_settings() -> None:
    config = EvalConfig(model="m", data="d", lm_eval_tasks=["arc_easy"], lm_eval_path="tasks", lm_eval_limit=5)
    assert (config.lm_eval_tasks, config.lm_eval_path, config.lm_eval_limit) == (["arc_easy"], "tasks", 5)
    with pytest.raises(UserError, match="lm_eval_limit"):
        EvalConfig(model="m", data="d", lm_eval_limit=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arc_easy", "piqa"])
def test_the_starter_model_on_real_questions_is_the_same_by_both(name: str, write_task: Callable[..., Path]) -> None:
    if not PRIOR.is_dir():
        pytest.skip(f"REAL DATA NOT CHECKED: {PRIOR} is missing")
    rows = [json.loads(line) for line in (PRIOR / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:60]]
    folder = write_task(f"{name}_60", rows)
    loaded = load_model("smollm2-135m")
    (result,) = lm_eval_abilities(loaded, [f"{name}_60"], include_path=str(folder), limit=None, batch_size=16)
    own = ours(loaded, folder / f"{name}_60.jsonl")
    assert (result.accuracy, result.accuracy_norm) == (own.accuracy, own.accuracy_norm)
    assert result.correct == own.correct
