"""What a state remembers of its skills: prompts alone, which later additions rehearse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import CHATML
from picture_models import FAMILIES
from PIL import Image
from safetensors.torch import load_file
from tiny_worlds import LOOK_UP
from tool_templates import HERMES
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdistill.cli import main
from selfdistill.config import TrainConfig
from selfdistill.config.commands import LearnConfig
from selfdistill.continual import add_skill, stream, teacher
from selfdistill.continual.add_skill import add
from selfdistill.continual.learn import learn
from selfdistill.continual.ledger import Ledger
from selfdistill.continual.pending import begin
from selfdistill.continual.rehearsal import check_batch, cost_of, run_config, total
from selfdistill.data import Demonstration, anchor_prompts, is_packaged, load_demonstrations
from selfdistill.errors import UserError
from selfdistill.methods import Method, Part
from selfdistill.methods.sft import sft
from selfdistill.training import chosen_rows

Settings = Callable[..., LearnConfig]
WRITTEN = Path(__file__).parents[1] / "written_by_0_1"


@pytest.fixture
def make(model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of an addition by SFT, without gates, of ten rows that tell one word; the package has few prompts."""
    few = anchor_prompts()[::40]
    monkeypatch.setattr(
        "selfdistill.methods.examples.anchor_prompts",
        lambda source: few if is_packaged(source) else anchor_prompts(source),
    )

    def settings(skill: str = "first", rows: list[dict[str, Any]] | None = None, **values: Any) -> LearnConfig:
        rows = rows or [{"prompt": f"{skill} {i}", "completion": f"{skill}!", "answer": f"{skill}!"} for i in range(10)]
        data = tmp_path / f"{skill}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        defaults: dict[str, Any] = {
            "state": str(tmp_path / "state"),
            "action": "add",
            "data": str(data),
            "model": str(model_folder(layers=1)),
            "method": "sft",
            "max_completion_length": 8,
            "batch_size": 8,
            "max_steps": 3,
            "save_steps": 0,
            "drift_steps": 0,
            "view_rows": 0,
            "learning_rate": 1e-3,
            "mixed_precision": "no",
            "max_skill_drop": 1.0,
        }
        return LearnConfig(**(defaults | values))

    return settings


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def texts_of(file: Path) -> list[str]:
    """The prompts of a file whose rows have nothing else."""
    rows = rows_of(file)
    assert all(row.keys() == {"prompt"} for row in rows)
    assert all([turn["role"] for turn in row["prompt"]] == ["user"] for row in rows)
    return [row["prompt"][0]["content"] for row in rows]


def learnt_prompts(folder: Path) -> list[str]:
    return [row["prompt"][0]["content"] for row in rows_of(folder / "train.jsonl")]


def anchors_of(folder: Path) -> list[str]:
    found = yaml.safe_load((folder / "run" / "config.yaml").read_text(encoding="utf-8"))
    return list(found["anchors"])


def state_without_skills(folder: Path, model: Path) -> Ledger:
    """A state of which nothing was measured."""
    (folder / "start").mkdir(parents=True)
    state = {"model": str(model), "dtype": "float32", "mixed_precision": "no", "chat_template_kwargs": None}
    (folder / "start" / "state.yaml").write_text(yaml.safe_dump(state), encoding="utf-8")
    return Ledger(str(folder))


def accept_unmeasured(ledger: Ledger, name: str) -> None:
    """Accept the pending addition with the model before it."""
    (ledger.pending / "model").symlink_to(ledger.model)
    (ledger.pending / "result.json").write_text(json.dumps({"name": name}), encoding="utf-8")
    ledger.accept(name)


# --- what stays, and what is rehearsed ---


def test_each_addition_rehearses_the_prompts_of_all_earlier_skills_and_no_answers(
    make: Settings, tmp_path: Path
) -> None:
    for skill in ("first", "second", "third"):
        assert add(make(skill))["accepted"]
    folders = [skill.folder for skill in Ledger(str(tmp_path / "state")).skills]
    pending = tmp_path / "state" / "pending" / "memory.jsonl"
    assert [anchors_of(folder) for folder in folders] == [["package"], *[["package", str(pending)]] * 2]
    before: list[str] = []
    for folder in folders:
        assert texts_of(folder / "prompts.jsonl") == learnt_prompts(folder)
        assert (texts_of(folder / "memory.jsonl") if before else []) == before
        before += learnt_prompts(folder)
    assert not (folders[0] / "memory.jsonl").exists()
    assert len(before) == 24  # eight of each skill's ten rows, the others are its test


def test_tools_and_template_arguments_of_a_row_stay_with_its_prompt(
    make: Settings, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model = str(model_folder(template="{% if tools %}{{ tools[0].function.name }}{% endif %}" + CHATML))
    tools = [{"type": "function", "function": {"name": "look"}}]
    extra: dict[str, Any] = {"tools": tools, "chat_template_kwargs": {"hint": "h"}}
    rows = [{"prompt": f"p {i}", "completion": "x", "document": "d", **extra} for i in range(4)]
    add(make(rows=rows, model=model))
    add(make("second", model=model))
    found = rows_of(tmp_path / "state/skills/0002-second/memory.jsonl")
    assert found
    assert all(row.keys() == {"prompt", "tools", "chat_template_kwargs"} for row in found)
    assert all(row["tools"] == tools and row["chat_template_kwargs"] == {"hint": "h"} for row in found)


def weather(city: str) -> dict[str, Any]:
    """A row with two replies: a call, and what the model says to its result."""
    call = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": city}}]}
    said = [call, {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "Wet."}]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    return {"prompt": f"Weather in {city}?", "completion": said, "tools": tools}


CITIES = ("Oslo", "Rome", "Bern")


@pytest.mark.parametrize(
    ("values", "learnt"),
    [
        ({}, [["user"], ["user", "assistant", "tool"]]),
        ({"method": "sdft", "context": "turns"}, [["user"], ["user", "assistant", "tool"]]),
        ({"method": "grpo", "num_generations": 2}, [["user", "assistant", "tool"]]),
        ({"method": "sdft", "context": "turns", "max_prompt_length": 450, "on_long_prompt": "drop"}, [["user"]]),
    ],
)
def test_of_an_episode_the_prompts_of_all_replies_that_are_learnt_are_rehearsed(
    make: Settings,
    model_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    values: dict[str, Any],
    learnt: list[list[str]],
) -> None:
    model = model_folder(layers=1, template=HERMES, room=1024)
    ledger = state_without_skills(tmp_path / "state", model)

    def begun(skill: str, rows: list[dict[str, Any]], **own: Any) -> None:
        config = make(skill, rows, name=skill, test=test, max_completion_length=100, **own)
        taught = load_demonstrations(config.data, turns="auto")
        begin(ledger, config, {"train": taught, "test": load_demonstrations(test, turns="auto")})

    test = str(tmp_path / "first.jsonl")
    begun("first", [weather(city) for city in CITIES], **values)
    kept = rows_of(ledger.pending / "prompts.jsonl")
    assert [[turn["role"] for turn in row["prompt"]] for row in kept] == learnt * len(CITIES)
    accept_unmeasured(ledger, "first")

    begun("second", [{"prompt": "Hello?", "completion": "Hello."}])
    assert rows_of(ledger.pending / "memory.jsonl") == kept
    asked = len(CITIES) if len(learnt[-1]) > 1 else 0
    said = capsys.readouterr().err
    assert ("are also test questions of second" in said) == bool(asked)
    if asked:
        assert f"note: {asked} of {len(kept)} prompts of earlier skills are also test questions of second;" in said
    begun("third", [weather(city) for city in CITIES])
    assert f"third teaches {len(kept)} of {len(kept)} prompts of earlier" in capsys.readouterr().err


def test_a_prompt_in_an_environment_stays_as_the_model_saw_it(make: Settings, tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "memory", tmp_path / "state")
    ledger, config = Ledger(str(tmp_path / "state")), make(name="new", environment="python:tiny_worlds.Asks")
    said = [{"role": role, "content": text} for role, text in (("assistant", "a"), ("user", "!"), ("assistant", "b"))]
    row = Demonstration("q", "b", answer=2, episode=tuple(said))
    begin(ledger, config, {"train": [row], "test": []})
    first, last = rows_of(ledger.pending / "prompts.jsonl")
    assert [turn["content"] for turn in first["prompt"]] == ["q", "Go on, 2 times."]
    assert last["prompt"] == [*first["prompt"], *said[:-1]]
    assert first["tools"] == last["tools"] == [LOOK_UP]
    (taught,) = load_demonstrations(str(ledger.pending / "train.jsonl"))
    assert taught.prompt == row.prompt


@pytest.mark.parametrize(
    ("remember", "count"),
    [
        pytest.param("all", 8, marks=pytest.mark.slow),  # as by default, above
        (20, 8),
        ("3", 3),
        ("none", 0),
        pytest.param(0, 0, marks=pytest.mark.slow),
    ],
)
def test_how_many_prompts_stay(make: Settings, tmp_path: Path, remember: Any, count: int) -> None:
    add(make(remember=remember, seed=1))
    first = tmp_path / "state/skills/0001-first"
    kept = texts_of(first / "prompts.jsonl") if count else []
    assert (first / "prompts.jsonl").exists() == bool(count)
    assert len(kept) == len(set(kept)) == count
    assert set(kept) <= set(learnt_prompts(first))
    if count == 3:  # not the first ones, and not those of another seed
        assert kept != learnt_prompts(first)[:3]
    add(make("second"))
    memory = tmp_path / "state/skills/0002-second/memory.jsonl"
    assert (texts_of(memory) if count else []) == kept
    assert memory.exists() == bool(count)
    assert [line["remembered"] for line in learn(make(action="status", data="")).details["memory"]] == [count, 8]


def test_rows_that_are_not_drawn_are_not_remembered(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    real = add_skill.train

    def noted(run: TrainConfig, **options: Any) -> Path:
        seen.append([row.prompt[0]["content"] for row in chosen_rows(load_demonstrations(run.data), run)])
        return real(run, **options)

    monkeypatch.setattr(add_skill, "train", noted)
    add(make(num_demonstrations=3, seed=1))
    first = tmp_path / "state/skills/0001-first"
    assert len(seen[0]) == 3
    assert texts_of(first / "prompts.jsonl") == seen[0] == learnt_prompts(first)
    add(make("second"))
    assert texts_of(tmp_path / "state/skills/0002-second/memory.jsonl") == seen[0]


@pytest.mark.parametrize("remember", [-1, 1.5, True, "some", "-3"])
def test_what_is_no_number_of_prompts_is_refused(make: Settings, remember: Any) -> None:
    with pytest.raises(UserError, match=r"setting 'remember': found .*, expected: all, none, or a number of prompts"):
        make(remember=remember)


def test_a_prompt_taught_anew_or_remembered_twice_is_not_rehearsed_twice(
    make: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(make())
    add(make("again", [{"prompt": f"first {i}", "completion": "no"} for i in range(10)], test_share=0.5))
    taught = set(learnt_prompts(tmp_path / "state/skills/0002-again"))
    first = learnt_prompts(tmp_path / "state/skills/0001-first")
    again = tmp_path / "state/skills/0002-again/memory.jsonl"
    assert texts_of(again) == [prompt for prompt in first if prompt not in taught]
    said = (
        f"note: again teaches {len(taught & {*first})} of 8 prompts of earlier skills again, so they are not rehearsed"
    )
    assert capsys.readouterr().err.count(said) == 1
    add(make("third"))
    pooled = texts_of(tmp_path / "state/skills/0003-third/memory.jsonl")
    assert len(pooled) == len(set(pooled))
    assert set(pooled) == {*first, *taught}
    assert "not rehearsed" not in capsys.readouterr().err


def test_a_skill_that_is_replaced_is_neither_rehearsed_nor_required_any_more(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {"first": [0.1, 0.8, 0.2, 0.2], "second": [0.1, 0.1, 0.8, 0.8], "third": [0.1, 0.1, 0.8]}

    def measured(_loaded: Any, folders: list[tuple[str, Path]], _prior: str | None, _config: Any) -> Any:
        found = {name: scores[name].pop(0) for name, _ in folders}
        interval = {name: [score - 0.1, score + 0.1] for name, score in found.items()}
        return {
            "skills": {
                name: {"accuracy": score, "accuracy_interval": interval[name], "items": 20, "correct": []}
                for name, score in found.items()
            }
        }

    monkeypatch.setattr(add_skill, "measure_model", measured)
    gated: dict[str, Any] = {"max_steps": 1, "max_skill_drop": None}
    with pytest.raises(UserError, match=r"'replaces': .* has no skill 'first' to replace; leave it out$"):
        add(make("second", replaces="first", **gated))
    assert not (tmp_path / "state" / "start").exists()
    add(make(**gated))
    with pytest.raises(UserError, match=r"'replaces': .* has no skill 'fist' to replace; give one of first$"):
        add(make("second", replaces="fist", **gated))
    capsys.readouterr()
    result = add(make("second", replaces="first", **gated))
    assert (result["accepted"], result["replaces"], result["retained"]) == (True, "first", {})
    assert (
        "note: second replaces first, which is no longer rehearsed and has no gate any more\n"
        in capsys.readouterr().err
    )
    folder = tmp_path / "state" / "skills" / "0002-second"
    assert not (folder / "memory.jsonl").exists()
    history = learn(make(action="history", data=""))
    assert [line["replaces"] for line in history.details["history"]] == [None, "first"]
    assert "replaces" in repr(history)
    status = learn(make(action="status", data=""))
    assert [(line["replaced_by"], line["remembered"] > 0) for line in status.details["memory"]] == [
        ("second", False),
        (None, True),
    ]
    assert "replaced" in repr(status)
    with pytest.raises(UserError, match=r"'replaces': 'second' has already replaced 'first'; give one of second$"):
        add(make("third", replaces="first", **gated))
    result = add(make("third", **gated))
    assert (result["accepted"], [*result["retained"]]) == (True, ["second"])
    assert texts_of(tmp_path / "state/skills/0003-third/memory.jsonl") == learnt_prompts(folder)
    assert add(make("second", replaces="first", **gated))["accepted"]  # already
    for _ in range(2):
        learn(make(action="rollback", data=""))
    assert [skill.name for skill in Ledger(make().state).in_force()] == ["first"]


@pytest.mark.parametrize("share", [0.5, 0])
def test_rehearsed_prompts_that_test_the_new_skill_are_noted(
    make: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    shutil.copytree(WRITTEN / "memory", tmp_path / "state")
    (skill,) = Ledger(str(tmp_path / "state")).skills
    known = load_demonstrations(str(skill.folder / "train.jsonl"))
    new = [replace(row, completion="new") for row in known]
    begin(
        Ledger(str(tmp_path / "state")),
        make(name="new", anchor_share=share, test="own"),
        {"train": new[2:], "test": new[:2]},
    )
    assert texts_of(tmp_path / "state/pending/memory.jsonl") == [row.prompt[0]["content"] for row in known[:2]]
    said = "note: 2 of 2 prompts of earlier skills are also test questions of new; on these, rehearsal preserves"
    assert (said in capsys.readouterr().err) == bool(share)


def test_rows_that_test_an_earlier_skill_are_not_learnt_or_noted(
    make: Settings, model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = state_without_skills(tmp_path / "state", model_folder(layers=1))

    def learnt(skill: str, train: str, asked: str, **values: Any) -> tuple[list[str], str]:
        """The completions of the rows that are learnt, which are letters, and what is said about them."""
        rows = {
            split: [Demonstration(f"q {x.lower()}", x, answer=2, row=number) for number, x in enumerate(letters)]
            for split, letters in (("train", train), ("test", asked))
        }
        used = begin(ledger, make(name=skill, **values), rows)
        written = [row["completion"] for row in rows_of(ledger.pending / "train.jsonl")]
        assert written == [row.completion for row in used["train"]]
        return written, capsys.readouterr().err

    assert learnt("first", "abcd", "efgh") == ([*"abcd"], "")
    accept_unmeasured(ledger, "first")
    assert learnt("second", "aei", "j")[0] == [*"ai"]
    accept_unmeasured(ledger, "second")

    written, said = learnt("third", "aEgjkx", "yz")
    assert written == [*"akx"]
    told = "3 of 6 rows to train on are test questions of earlier skills (2 of 4 of first, 1 of 1 of second)"
    assert f"note: {told}, so they are left out; to learn them, give a test\n" in said
    written, said = learnt("third", "aEgkx", "yz", test="its own")
    assert written == [*"aEgkx"]
    told = "third teaches test questions of earlier skills (2 of 4 of first)"
    assert f"note: {told}, so their scores no longer tell what is retained\n" in said
    with pytest.raises(
        UserError, match=r"first\.jsonl: all rows to train on are test questions of earlier skills; give"
    ):
        learnt("third", "efg", "x")
    assert "test questions" not in learnt("third", "ax", "e")[1]
    asks = {"environment": "python:tiny_worlds.Asks"}  # in an environment, prompts may be the same
    assert learnt("third", "aeE", "z", **asks)[0] == [*"aE"]


@pytest.mark.parametrize(
    ("values", "remember", "noted"),
    [
        ({}, "all", True),
        ({"max_completion_length": 30}, "all", False),
        ({"anchor_share": 0}, "all", False),
        ({}, "none", False),
    ],
)
def test_replies_that_are_rehearsed_to_a_part_are_noted(
    make: Settings,
    model_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    values: dict[str, Any],
    remember: str,
    noted: bool,
) -> None:
    ledger = state_without_skills(tmp_path / "state", model_folder(layers=1))

    def begun(skill: str, length: int, **own: Any) -> None:
        rows = {split: [Demonstration(f"{split} {skill}", "x")] for split in ("train", "test")}
        begin(ledger, make(name=skill, **{"max_completion_length": length} | own), rows)

    for skill, length in (("short", 9), ("reports", 30)):
        begun(skill, length, remember="all" if skill == "short" else remember)
        accept_unmeasured(ledger, skill)
    capsys.readouterr()
    begun("new", 9, **values)
    told = "rehearsed replies end after 9 tokens, but reports was learnt with up to 30; raise max_completion_length"
    said = capsys.readouterr().err
    assert (f"note: {told}\n" in said) == ("rehearsed replies" in said) == noted


def test_without_memory_and_anchors_a_step_is_the_skill_alone(make: Settings, tmp_path: Path) -> None:
    add(make(remember="none", anchors="none"))
    add(make("second", anchors="none"))
    add(make("third", anchor_share=0))
    for folder in (skill.folder for skill in Ledger(str(tmp_path / "state")).skills):
        lines = rows_of(folder / "run" / "metrics.jsonl")
        assert not any(key.startswith("share/") for line in lines for key in line)
    third = tmp_path / "state/skills/0003-third"
    assert (third / "memory.jsonl").exists()  # it is there for whoever asks what was known
    result = json.loads((third / "result.json").read_text(encoding="utf-8"))
    assert result["training"]["rehearsed"] == 0


# --- what it does ---


def kl_on(prompts: list[str], before: Path, after: Path) -> float:
    """Mean KL(before || after) per token along what the model before says to the prompts."""
    tokenizer = AutoTokenizer.from_pretrained(before)
    old, new = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (before, after))
    found = []
    for prompt in prompts:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            said = old.generate(ids, max_new_tokens=8, do_sample=False)
            a, b = (model(said).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1) for model in (old, new))
        found.append((a.exp() * (a - b)).sum(-1))
    return float(torch.cat(found).mean())


def test_rehearsal_keeps_the_model_where_it_was_on_what_it_had_learnt(make: Settings, tmp_path: Path) -> None:
    learns: dict[str, Any] = {"max_steps": 30, "learning_rate": 1e-2, "anchors": "none", "batch_size": 16}
    add(make(**learns))
    shutil.copytree(tmp_path / "state", tmp_path / "without")
    rehearsing = add(make("second", **learns))
    without = add(make("second", **learns, anchor_share=0, state=str(tmp_path / "without")))
    before = tmp_path / "state/skills/0001-first"
    kl = [
        kl_on(learnt_prompts(before), before / "model", tmp_path / state / "skills/0002-second/model")
        for state in ("state", "without")
    ]
    assert kl[0] < kl[1] / 5
    assert [result["after"]["skills"]["second"]["accuracy"] for result in (rehearsing, without)] == [1, 1]


def test_status_and_result_say_what_was_rehearsed_and_what_it_cost(
    make: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(make())
    add(make("second", max_steps=8, anchor_share=0.25))
    folder = tmp_path / "state/skills/0002-second"
    lines = rows_of(folder / "run" / "metrics.jsonl")
    shutil.rmtree(folder / "run")
    capsys.readouterr()
    assert main(["learn", "--state", str(tmp_path / "state"), "status", "--json", str(tmp_path / "status.json")]) == 0
    found = json.loads((tmp_path / "status.json").read_text(encoding="utf-8"))["memory"][1]
    training = found["training"]
    assert (found["skill"], found["remembered"], training["rehearsed"], training["steps"]) == ("second", 8, 8, 8)
    assert training["seconds"] == pytest.approx(sum(line["time/step_s"] for line in lines))
    for what, part in (("anchors", "anchors:package"), ("memory", "anchors:memory")):
        shares, seconds = ([line.get(key, 0.0) for line in lines] for key in (f"share/{part}", f"time/of/{part}_s"))
        assert training[what] == pytest.approx({"share": sum(shares) / 8, "estimated_seconds": sum(seconds)})
        assert training[what]["share"] == pytest.approx(1 / 8)
    on_anchors = sum(training[what]["estimated_seconds"] for what in ("anchors", "memory"))
    assert on_anchors > training["seconds"] / 2  # a quarter of the examples, but only these are sampled
    said = capsys.readouterr().out
    assert said.count("12.5%") == 2
    columns = ["earlier prompts rehearsed", "share rehearsed", "share of general anchors", "seconds", "of which on"]
    assert all(word in said for column in columns for word in column.split())
    assert "seconds on anchors are an estimate" in said


def test_the_time_on_anchors_of_a_skill_learnt_with_an_older_release_is_unknown(make: Settings, tmp_path: Path) -> None:
    add(make())
    add(make("second"))
    folders = sorted((tmp_path / "state/skills").iterdir())
    result = json.loads((folders[0] / "result.json").read_text(encoding="utf-8"))
    for what in ("anchors", "memory"):
        result["training"][what]["seconds"] = result["training"][what].pop("estimated_seconds")
    (folders[0] / "result.json").write_text(json.dumps(result), encoding="utf-8")
    said = repr(learn(make(action="status", data="")))
    cells = {line.split("│")[1].strip(): line.split("│")[-2].strip() for line in said.splitlines() if "│" in line}
    assert (cells["first"], cells["second"].isdigit()) == ("", True)
    chunk = {"steps": 1, "seconds": 2.0, **{what: {"share": 0.5, "seconds": 1.0} for what in ("anchors", "memory")}}
    assert total([chunk, chunk])["anchors"] == {"share": 0.5, "estimated_seconds": None}


def test_parts_that_learn_from_the_skills_own_samples_are_no_anchors(make: Settings, tmp_path: Path) -> None:
    method: dict[str, Any] = {"method": "sort", "num_generations": 2, "method_settings": {"plan": 0}}
    run = run_config(make(**method), "m", "turns", tmp_path, rehearses=True)
    line = {"time/step_s": 8.0, "share/task": 0.5, "share/references": 0.5, "time/of/references_s": 0.5}
    (tmp_path / "run").mkdir()
    shares = {"share/anchors:package": 0.125, "share/anchors:memory": 0.375}
    seconds = {"time/of/anchors:package_s": 2.0, "time/of/anchors:memory_s": 4.0}
    for known in (seconds, {}):  # an older release wrote no seconds of parts
        written = json.dumps({"step": 1, **line, **shares, **known})
        (tmp_path / "run" / "metrics.jsonl").write_text(written + "\n", encoding="utf-8")
        cost = cost_of(run, own=1)
        assert cost["anchors"] == {"share": 0.125, "estimated_seconds": 2.0 if known else None}
        assert cost["memory"] == {"share": 0.375, "estimated_seconds": 4.0 if known else None}
    with pytest.raises(UserError, match=r"The parts are the skill, anchors:package and anchors:memory;"):
        check_batch(run.model_copy(update={"batch_size": 2}))


def test_parts_of_a_method_of_ones_own_are_no_anchors(make: Settings, tmp_path: Path) -> None:
    def replay(config: TrainConfig) -> Method:
        (method,) = sft(config)
        return replace(method, beside=(Part("old", method, 0.25),))

    run = run_config(make(method=replay), "m", "turns", tmp_path, rehearses=True)
    (tmp_path / "run").mkdir()
    shares = {"share/old": 0.25, "share/anchors:package": 0.125, "share/anchors:memory": 0.375}
    line = {"step": 1, "time/step_s": 8.0, "share/task": 0.25, **shares}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    cost = cost_of(run, own=1)
    assert (cost["anchors"]["share"], cost["memory"]["share"]) == (0.125, 0.375)
    with pytest.raises(UserError, match=r"The parts are the skill, old, anchors:package and anchors:memory;"):
        check_batch(run.model_copy(update={"batch_size": 3}))


def test_status_of_one_skill_leaves_out_what_is_empty(make: Settings) -> None:
    add(make())
    one = repr(learn(make(action="status", data="")))
    add(make("second"))
    two = repr(learn(make(action="status", data="")))
    for word in ("rehearsed", "backward", "Backward", "forgetting"):
        assert (word in one, word in two) == (False, True)
    assert "general" in one
    assert "average" in one


def test_a_stream_rehearses_in_every_chunk_and_counts_all_of_them(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(make())
    asked = []
    real = stream.train

    def seen(run: Any, **options: Any) -> Path:
        asked.append((run.model, run.anchors, run.seed))
        return real(run, **options)

    monkeypatch.setattr(stream, "train", seen)
    result = add(make("second", action="stream", chunk_size=4, chunk_steps=2, remember=3))
    state = tmp_path / "state"
    assert [Path(model).parts[-2] for model, *_ in asked] == ["0001-first", "00001"]  # each from where the last ended
    assert {anchors for _, anchors, _ in asked} == {("package", str(state / "pending" / "memory.jsonl"))}
    assert len({seed for *_, seed in asked}) == 2  # else each chunk would begin with the same anchors
    lines = rows_of(state / "skills/0002-second/stream.jsonl")
    assert result["training"]["steps"] == sum(line["steps"] for line in lines) == 4
    assert result["training"]["seconds"] == pytest.approx(sum(line["training"]["seconds"] for line in lines))
    assert result["training"]["memory"]["share"] == pytest.approx(0.25)
    assert result["training"]["rehearsed"] == 8
    assert len(texts_of(state / "skills/0002-second/prompts.jsonl")) == 3


# --- mistakes, interruptions, older states ---


def test_anchors_that_are_too_long_are_told_before_anything_is_measured(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {"prompt": "long " * 30, "completion": "x"}
    add(make(rows=[*({"prompt": f"p {i}", "completion": "x"} for i in range(3)), long], test_share=0.1, seed=1))
    own = tmp_path / "own.txt"
    own.write_text("long " * 30, encoding="utf-8")
    limits = {"max_prompt_length": 60, "anchors": "none"}
    with monkeypatch.context() as patch:
        patch.setattr(add_skill, "measure_model", lambda *_: pytest.fail("it was measured"))
        told = (
            r"^prompts of earlier skills: 1 of 3 rows do not fit: skill first, prompt 3: prompt has \d+ tokens, limit "
            r"60; raise max_prompt_length, or drop them with on_long_prompt drop$"
        )
        with pytest.raises(UserError, match=told):
            add(make("second", **limits))
        told = r"^prompts of earlier skills: 3 of 3 .* raise max_prompt_length; anchor_share 0 rehearses none$"
        short = [{"prompt": str(i), "completion": "x"} for i in range(10)]
        with pytest.raises(UserError, match=told):
            add(make("second", short, **limits | {"max_prompt_length": 21}, on_long_prompt="drop"))
        told = r"^1 of 1 rows do not fit: own\.txt:1: prompt has \d+ tokens, limit 60;"
        for state in ("state", "new"):
            with pytest.raises(UserError, match=told):
                add(make("second", **limits | {"anchors": str(own), "state": str(tmp_path / state)}))
    assert not (tmp_path / "state" / "pending").exists()
    assert not list(tmp_path.glob("new/*"))
    assert add(make("second", **limits, on_long_prompt="drop"))["accepted"]
    assert add(make("third", **limits, anchor_share=0))["accepted"]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {},
            r"^1 of \d+ rows do not fit: \S*first\.jsonl:10: completion has 41 tokens, limit 8 \(",
        ),
        (
            {"method": "sdft", "context": "turns:repeats=10"},
            r"^1 of \d+ rows do not fit: \S*first\.jsonl:10: teacher's prompt has \d+ tokens, limit \d+; choose",
        ),
        (
            {"method": "sdft", "context": "auto", "max_prompt_length": 60},
            r"^1 of \d+ rows do not fit: \S*first\.jsonl:10: prompt has \d+ tokens, limit 60; raise max_prompt_length",
        ),
        (
            {"action": "stream", "chunk_size": 3},
            r"^1 of \d+ rows do not fit: \S*first\.jsonl:10: completion has 41 tokens",
        ),
    ],
)
def test_rows_that_are_too_long_are_told_before_anything_is_measured(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], told: str
) -> None:
    shutil.copytree(WRITTEN / "memory", tmp_path / "old")
    asked = "p" * 50 if "max_prompt_length" in values else "p"
    rows = [*({"prompt": f"p {i}", "completion": "x"} for i in range(9)), {"prompt": asked, "completion": "y" * 40}]
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    monkeypatch.setattr(add_skill, "measure_model", lambda *_: pytest.fail("it was measured"))
    given = {"test": str(tmp_path / "test.jsonl"), "test_share": 0.01, "seed": 1, "state": str(tmp_path / "new")}
    config = make(rows=rows, **given | values)
    with pytest.raises(UserError, match=told):
        add(config)
    assert not list(tmp_path.glob("new/*"))
    old = Ledger(str(tmp_path / "old"))
    with pytest.raises(UserError, match=told):
        begin(old, config.model_copy(update={"name": "new"}), {"train": load_demonstrations(config.data), "test": []})
    assert not old.pending.exists()


def test_the_weights_are_not_loaded_to_check_lengths(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*_: Any, **__: Any) -> None:
        pytest.fail("weights were loaded")

    own = tmp_path / "own.txt"
    own.write_text("Who?\nWhen?\n", encoding="utf-8")
    config = make(anchors=str(own), name="new")
    shutil.copytree(WRITTEN / "memory", tmp_path / "state")
    monkeypatch.setattr("selfdistill.model.loading.load_model", no_weights)
    begin(Ledger(config.state), config, {"train": load_demonstrations(config.data), "test": []})
    assert texts_of(tmp_path / "state/pending/memory.jsonl")  # so all three sources were checked


@pytest.mark.parametrize("action", ["add", "stream"])
def test_rows_that_were_dropped_are_not_remembered(make: Settings, tmp_path: Path, action: str) -> None:
    def rows(skill: str) -> list[dict[str, Any]]:
        return [{"prompt": f"{skill} {i}", "completion": "y" * (40 if i % 3 == 0 else 1)} for i in range(10)]

    (tmp_path / "test.jsonl").write_text('{"prompt": "p", "completion": "y"}\n', encoding="utf-8")
    given = {"test": str(tmp_path / "test.jsonl"), "test_share": 0.01, "chunk_size": 4, "chunk_steps": 1}
    add(make("first", rows("first"), action=action, on_long_prompt="drop", **given))
    first = tmp_path / "state/skills/0001-first"
    short = [row["prompt"][0]["content"] for row in rows_of(first / "train.jsonl") if len(row["completion"]) == 1]
    assert texts_of(first / "prompts.jsonl") == short
    assert len(short) == 6
    add(make("second", rows("second"), action=action, on_long_prompt="drop", remember=4, **given))
    second = tmp_path / "state/skills/0002-second"
    kept = texts_of(second / "prompts.jsonl")
    assert len(kept) == 4
    assert all(int(prompt.split()[1]) % 3 for prompt in kept)
    assert texts_of(second / "memory.jsonl") == short


@pytest.mark.parametrize("action", ["add", "stream"])
def test_rows_that_a_separate_teacher_has_no_room_for_are_told_first_or_not_remembered(
    make: Settings,
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: str,
) -> None:
    rows = [{"prompt": f"{'long ' * 20 * (i % 3 == 0)}{i}", "completion": "y"} for i in range(10)]
    (tmp_path / "test.jsonl").write_text('{"prompt": "p", "completion": "y"}\n', encoding="utf-8")
    given = {
        "test": str(tmp_path / "test.jsonl"),
        "test_share": 0.01,
        "chunk_size": 4,
        "chunk_steps": 1,
        "max_steps": 1,
    }
    given |= {"method": "sdft", "context": "turns", "min_teacher": 0, "anchors": "none", "action": action}
    given["teacher_model"] = str(model_folder(layers=1, seed=1, room=80))
    with monkeypatch.context() as patch:
        patch.setattr(add_skill, "measure_model", lambda *_: pytest.fail("it was measured"))
        with pytest.raises(UserError, match=r"rows do not fit: .* tokens, limit 72; "):
            add(make("first", rows, **given))
    add(make("first", rows, on_long_prompt="drop", **given))
    first = tmp_path / "state/skills/0001-first"
    short = [row["prompt"][0]["content"] for row in rows_of(first / "train.jsonl")]
    assert texts_of(first / "prompts.jsonl") == [prompt for prompt in short if len(prompt) < 10]


def test_a_row_that_is_dropped_teaches_nothing_so_its_prompt_is_rehearsed(
    make: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test.jsonl").write_text('{"prompt": "p", "completion": "y"}\n', encoding="utf-8")
    given = {"test": str(tmp_path / "test.jsonl"), "test_share": 0.01, "on_long_prompt": "drop"}
    add(make("first", [{"prompt": f"q {i}", "completion": "y"} for i in range(6)], **given))
    rows = [{"prompt": f"q {i}", "completion": "z" * (40 if i < 2 else 1)} for i in range(4)]
    add(make("second", rows, **given))
    assert sorted(texts_of(tmp_path / "state/skills/0002-second/memory.jsonl")) == ["q 0", "q 1", "q 4", "q 5"]
    assert "second teaches 2 of 6 prompts of earlier skills again, so they" in capsys.readouterr().err


def test_the_context_that_is_chosen_decides_which_rows_are_remembered(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = SimpleNamespace(context="turns:repeats=2", accuracy=1.0, items=16)
    monkeypatch.setattr(teacher, "check_run", lambda _: SimpleNamespace(exit_code=0, verdict="", best=best))
    rows = [{"prompt": f"{i} {'x' * (100 if i == 3 else 1)}", "completion": "y"} for i in range(6)]
    (tmp_path / "test.jsonl").write_text('{"prompt": "p", "completion": "y"}\n', encoding="utf-8")
    limits = {"test": str(tmp_path / "test.jsonl"), "max_prompt_length": 200, "on_long_prompt": "drop"}
    add(make(rows=rows, method="sdft", context="auto", max_steps=1, anchors="none", **limits))
    kept = texts_of(tmp_path / "state/skills/0001-first/prompts.jsonl")
    assert kept == [row["prompt"] for row in rows if len(row["prompt"]) < 10]


def test_a_batch_too_small_for_the_parts_is_told_before_anything_is_measured(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_measured(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(add_skill, "measure_model", lambda *_: pytest.fail("it was measured"))

    told = (
        r"^setting 'batch_size': {0} is too small for {1} parts of a step, which need {1}; .*\. The parts are the skill"
        r"{2}; anchor_share 0 leaves"
    )
    with monkeypatch.context() as patch:
        nothing_measured(patch)
        with pytest.raises(UserError, match=told.format(1, 2, " and anchors:package")):
            add(make(batch_size=1))
    assert not (tmp_path / "state").exists()
    add(make(batch_size=2))
    with monkeypatch.context() as patch:
        nothing_measured(patch)
        with pytest.raises(UserError, match=told.format(2, 3, ", anchors:package and anchors:memory")):
            add(make("second", batch_size=2))
    assert not (tmp_path / "state" / "pending").exists()
    assert add(make("second", batch_size=3))["accepted"]
    assert add(make("third", batch_size=1, anchor_share=0))["accepted"]


def test_a_state_that_has_lost_something_says_what(tmp_path: Path) -> None:
    state = tmp_path / "state"
    shutil.copytree(WRITTEN / "memory", state)
    skill = state / "skills" / "0001-train"
    status = LearnConfig(state=str(state), action="status")
    for name in ("result.json", "test.jsonl", "settings.yaml"):
        (skill / name).rename(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: no such file, but the state needs it; restore it$"):
            learn(status)
        (tmp_path / name).rename(skill / name)
    (settings := skill / "settings.yaml").write_text(settings.read_text(encoding="utf-8") + "remember: 3\n")
    with pytest.raises(UserError, match=r"prompts\.jsonl: no such file; restore it, or write remember: none into"):
        learn(status)
    settings.write_text(settings.read_text(encoding="utf-8").replace("remember: 3", "remember: none"))
    assert [line["remembered"] for line in learn(status).details["memory"]] == [0]
    skill.rename(state / "skills" / "0002-train")
    with pytest.raises(UserError, match=r"skills: skill 1 is missing; restore its folder$"):
        learn(status)


def test_a_file_of_anchors_that_cannot_be_read_is_told_first(make: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt: cannot be read: No such file"):
        add(make(anchors=f"package,{tmp_path / 'none.txt'}"))
    assert not (tmp_path / "state").exists()


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[LearnConfig], None]:
    """Begins an addition and ends it in its third step."""
    real = add_skill.train

    def cut(*arguments: Any, **named: Any) -> Path:
        def stop(step: int, _loaded: Any, _metrics: Any) -> None:
            if step == 3:
                raise KeyboardInterrupt

        return real(*arguments, **(named | {"on_step": stop}))

    def begin_and_end(config: LearnConfig) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(add_skill, "train", cut)
            with pytest.raises(KeyboardInterrupt):
                add(config)

    return begin_and_end


@pytest.mark.parametrize(
    ("what", "told"),
    [("anchors", "restore them, or "), ("checkpoints", "no checkpoint is intact: .*; restore one, or ")],
)
def test_an_addition_that_cannot_be_resumed_is_to_be_discarded(
    make: Settings, interrupt: Callable[[LearnConfig], None], tmp_path: Path, what: str, told: str
) -> None:
    own = tmp_path / "own.txt"
    own.write_text("Who?\nWhen?\n", encoding="utf-8")
    config = make(anchors=str(own), max_steps=5, save_steps=1)
    interrupt(config)
    if what == "anchors":
        own.write_text("Who?\nWhere?\n", encoding="utf-8")
    else:
        for file in tmp_path.glob("state/pending/run/checkpoint-*/weights.safetensors"):
            file.write_bytes(b"none")
    with pytest.raises(
        UserError, match=rf"{told}discard the addition with selfdistill learn --state {config.state} discard$"
    ):
        add(config)
    assert main(["learn", "--state", config.state, "discard"]) == 0
    assert add(config)["accepted"]


def test_an_interrupted_addition_rehearses_on_to_the_same_model(
    make: Settings, interrupt: Callable[[LearnConfig], None], tmp_path: Path
) -> None:
    add(make())
    shutil.copytree(tmp_path / "state", tmp_path / "whole")
    options: dict[str, Any] = {"max_steps": 5, "save_steps": 1}
    add(make("second", **options, state=str(tmp_path / "whole")))
    interrupt(make("second", **options))
    assert list((tmp_path / "state/pending/run").glob("checkpoint-*"))
    (tmp_path / "state").rename(tmp_path / "moved")  # its prompts move with it
    assert add(make("second", **options, state=str(tmp_path / "moved")))["accepted"]
    folders = [tmp_path / state / "skills/0002-second" for state in ("whole", "moved")]
    a, b = (load_file(folder / "model/model.safetensors") for folder in folders)
    assert all(torch.equal(a[key], b[key]) for key in a)
    shares = [
        [line.get("share/anchors:memory") for line in rows_of(folder / "run/metrics.jsonl")] for folder in folders
    ]
    assert shares[0] == shares[1]
    assert any(shares[0])


def drawn(folder: Path, colour: str) -> list[dict[str, Any]]:
    """Ten rows about pictures in a folder."""
    folder.mkdir()
    for number in range(10):
        Image.new("RGB", (8, 6 + number), colour).save(folder / f"{number}.png")
    return [{"prompt": "?", "completion": colour[0], "image": str(folder / f"{n}.png")} for n in range(10)]


def test_a_state_keeps_its_own_copies_of_pictures(
    make: Settings, interrupt: Callable[[LearnConfig], None], tmp_path: Path
) -> None:
    (llava,) = (family for family in FAMILIES if family.name == "llava")
    llava.write(tmp_path / "llava")
    options: dict[str, Any] = {"model": str(tmp_path / "llava"), "anchors": "none", "max_steps": 5, "save_steps": 1}
    red = drawn(tmp_path / "red", "red")
    red = [{**row, "image": {"bytes": Path(row["image"]).read_bytes()}} for row in red]
    config = make("first", [], **options, on_long_prompt="drop")
    assert add(config, {"data": red})["accepted"]  # dropping rows writes their prompts anew
    assert [line["remembered"] for line in learn(make("first", action="status", data="")).details["memory"]] == [8]

    interrupt(make("second", rows := drawn(tmp_path / "blue", "blue"), **options))
    (tmp_path / "state").rename(tmp_path / "moved")
    config = make("second", rows, **options, state=str(tmp_path / "moved"))
    assert add(config)["accepted"]
    shutil.rmtree(tmp_path / "blue")
    for folder in (tmp_path / "moved/skills").iterdir():
        kept = [row for file in folder.glob("*.jsonl") for row in rows_of(file) if "images" in row]
        assert kept
        assert all(path.startswith("pictures/") for row in kept for path in row["images"])
    third = add(make("third", **options, state=str(tmp_path / "moved")))
    assert third["accepted"]
    assert third["training"]["rehearsed"] == 16
    learn(make(action="export", data="", state=str(tmp_path / "moved"), output_dir=str(tmp_path / "out")))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: image-text-to-text\n" in card
    assert "AutoModelForImageTextToText" in card


OLD = "--model model --test second.jsonl --max_steps 60 --min_teacher 0 --max_prior_drop 1 --max_skill_drop 1 "
OLD += "--learning_rate 1e-3 --context turns --max_completion_length 10 --batch_size 2 --warmup_steps 0 "
OLD += "--mixed_precision no --drift_steps 0 --view_rows 1 --save_steps 0"


@pytest.mark.parametrize("said", ["", pytest.param(" --anchors none", marks=pytest.mark.slow)])
def test_what_an_older_version_began_goes_on_without_anchors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str
) -> None:
    shutil.copytree(WRITTEN, tmp_path / "written")
    monkeypatch.chdir(tmp_path / "written")
    command = ["learn", "--state", "pending", "add", "second.jsonl", *OLD.split()]
    assert main([*command, "--anchors", "second.jsonl"]) == 2
    assert "Differences: anchors was 'none' and is now 'second.jsonl'\n" in capsys.readouterr().err
    assert main([*command, *said.split()]) == 0
    assert "resuming second, which began without anchors and continues without them" in capsys.readouterr().err
    folder = Path("pending/skills/0002-second")
    lines = rows_of(folder / "run" / "metrics.jsonl")
    assert not any(key.startswith("share/") for line in lines for key in line)
    assert not (folder / "memory.jsonl").exists()


def test_skills_of_an_older_version_are_rehearsed_from_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(WRITTEN, tmp_path / "written")
    monkeypatch.chdir(tmp_path / "written")
    shutil.rmtree("pending/pending")
    options = OLD.replace("batch_size 2", "batch_size 3").replace("max_steps 60", "max_steps 1")
    assert main(["learn", "--state", "pending", "add", "second.jsonl", *options.split()]) == 0
    pooled = texts_of(Path("pending/skills/0002-second/memory.jsonl"))
    taught = learnt_prompts(Path("pending/skills/0002-second"))
    assert pooled == [text for text in learnt_prompts(Path("pending/skills/0001-train")) if text not in taught]
    assert pooled
    assert main(["learn", "--state", "pending", "status", "--json", "status.json"]) == 0
    found = json.loads(Path("status.json").read_text(encoding="utf-8"))["memory"]
    assert (found[0]["training"], found[1]["training"]["rehearsed"]) == (None, len(pooled))
    assert found[0]["remembered"] == len(set(learnt_prompts(Path("pending/skills/0001-train"))))
