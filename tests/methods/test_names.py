"""Where help and pages list methods, they list those whose slots are so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import yaml
from conftest import methods_where

from selfdistill.config.method import SCORED_METHODS, MethodName
from selfdistill.config.train import TrainConfig
from selfdistill.methods import own_names, rules_of

ROOT = Path(__file__).parents[2]
NAMES = get_args(MethodName)


def named(text: str) -> set[str]:
    """The methods in backticks."""
    return {word for word in re.findall(r"`(\w+)`", text) if word in NAMES}


def between(page: str, start: str, end: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count(start) == 1, f"{page} has not one place with {start!r}"
    return text.split(start)[1].split(end)[0]


def help_of(setting: str) -> str:
    return TrainConfig.model_fields[setting].description or ""


def test_help_lists_every_method_and_those_that_take_another_teacher() -> None:
    assert named(help_of("method")) == set(NAMES)
    assert named(help_of("teacher_model")) == set(methods_where(lambda method: True, teacher_model="other"))


def test_scored_methods_are_those_with_a_checker() -> None:
    assert sorted(SCORED_METHODS) == sorted(methods_where(lambda method: method.checker is not None))


def test_the_page_about_agents_says_which_methods_can_use_an_environment() -> None:
    played = methods_where(lambda method: rules_of(method) is not None, environment="bundled:shop")
    accepted = methods_where(lambda method: True, environment="bundled:shop")
    assert named(between("docs/agents.md", "**Methods.**", "`sft`,")) == set(played)
    assert named(between("docs/agents.md", "Other methods are refused:", "[Anchors]")) == {*NAMES} - {*accepted}


def test_pages_say_which_methods_learn_an_episode_in_one_sequence() -> None:
    whole = methods_where(lambda method: getattr(method.examples, "replies", "") == "episode")
    (of_data,) = re.findall(r"\n- (.*) learn all replies of an episode", (ROOT / "docs/data.md").read_text("utf-8"))
    assert named(of_data) == set(whole)
    assert named(between("docs/agents.md", "or the feedback.\n", " learn the episodes")) == set(whole)


def test_the_page_about_methods_says_which_were_measured() -> None:
    study = yaml.safe_load((ROOT / "configs/study/baselines.yaml").read_text(encoding="utf-8"))
    assert named(between("docs/methods.md", "-seeds) compares", "on the facts of")) == set(study["methods"])


def test_the_help_names_own_settings_of_a_method() -> None:
    ((example, method),) = re.findall(r"e\.g\. ``(\{.*\})`` for ``(\w+)``", help_of("method_settings"))
    assert set(json.loads(example)) <= set(own_names(method))
    assert methods_where(lambda _: True, method=method, method_settings=json.loads(example))
