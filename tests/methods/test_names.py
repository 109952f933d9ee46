"""Where help and pages list methods, they list those whose slots are so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from shared import methods_where, needs

from selfdistill.config.commands import CompareConfig
from selfdistill.config.method import MethodName
from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.methods import own_names, rules_of, uses

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


def whole_episodes() -> list[str]:
    """The methods that learn an episode in one sequence."""
    return methods_where(lambda method: getattr(method.examples, "replies", "") == "episode")


def accepted_in_environments() -> list[str]:
    return methods_where(lambda method: True, environment="bundled:shop")


def config_of(method: str) -> TrainConfig:
    needed = {"model": "m", "data": "d", "output_dir": "o", "scorer": "exact"}
    return TrainConfig(method=method, **(needed | needs(method, "m")))


def measured_methods() -> list[str]:
    return list(yaml.safe_load((ROOT / "configs/study/baselines.yaml").read_text(encoding="utf-8"))["methods"])


LISTS: list[tuple[str, Callable[[], str], Callable[[], Collection[str]]]] = [
    ("the help of 'method' in config/train.py", lambda: help_of("method"), lambda: NAMES),
    (
        "the help of 'teacher_model' in config/train.py",
        lambda: help_of("teacher_model"),
        lambda: methods_where(lambda method: True, teacher_model="other"),
    ),
    (
        "the help of 'success_reward' in config/method.py",
        lambda: help_of("success_reward"),
        lambda: [name for name in NAMES if uses(config_of(name), "success_reward")],
    ),
    (
        "docs/agents.md, 'Methods.'",
        lambda: between("docs/agents.md", "**Methods.**", "`sft`,"),
        lambda: methods_where(lambda method: rules_of(method) is not None, environment="bundled:shop"),
    ),
    (
        "docs/agents.md, 'Other methods are refused'",
        lambda: between("docs/agents.md", "Other methods are refused:", "[Anchors]"),
        lambda: {*NAMES} - {*accepted_in_environments()},
    ),
    (
        "docs/agents.md, methods that learn whole episodes",
        lambda: between("docs/agents.md", "or the feedback.\n", " learn the episodes"),
        whole_episodes,
    ),
    (
        "docs/data.md, methods that learn all replies of an episode",
        lambda: between("docs/data.md", "\n\n- `sft`", " learn all replies of an episode") + "`sft`",
        whole_episodes,
    ),
    (
        "docs/methods.md, methods that a study compares",
        lambda: between("docs/methods.md", "-seeds) compares", "on the facts of"),
        measured_methods,
    ),
]


@pytest.mark.parametrize(("where", "text", "wanted"), LISTS, ids=[where for where, _, _ in LISTS])
def test_a_list_of_methods_has_those_whose_slots_are_so(
    where: str, text: Callable[[], str], wanted: Callable[[], Collection[str]]
) -> None:
    found, names = named(text()), {*wanted()}
    assert found == names, (
        f"{where}: add {sorted(names - found) or 'nothing'}, remove {sorted(found - names) or 'nothing'}"
    )


def test_the_help_names_own_settings_of_a_method() -> None:
    ((example, method),) = re.findall(r"e\.g\. ``(\{.*\})`` for ``(\w+)``", help_of("method_settings"))
    assert set(json.loads(example)) <= set(own_names(method))
    assert methods_where(lambda _: True, method=method, method_settings=json.loads(example))


@pytest.mark.parametrize("settings", [{"method": "past"}, {"methods": ["sft", "PaST"]}], ids=str)
def test_the_name_of_past_leads_to_merge(settings: dict[str, Any]) -> None:
    kind = CompareConfig if "methods" in settings else TrainConfig
    with pytest.raises(
        UserError, match=r"expected: a method that trains; PaST adds weights .*: use the command merge$"
    ):
        kind(model="m", data="d", output_dir="o", **settings)
