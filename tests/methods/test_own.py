"""A user's own method, named ``python:module.function`` or given in Python, runs as the package's methods do."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ENDS, final_weights, same

import selfdistill as sd
from selfdistill.cli import main
from selfdistill.config.commands import CompareConfig
from selfdistill.config.train import TrainConfig
from selfdistill.data import Verdict
from selfdistill.loss import CrossEntropy, Divergence
from selfdistill.methods import FROZEN, Method, Part, uses
from selfdistill.methods.grpo import GroupAdvantages, grpo
from selfdistill.methods.hints import HintSchedule
from selfdistill.methods.sdft import sdft
from selfdistill.methods.sequences import StudentSamples
from selfdistill.methods.sft import sft
from selfdistill.model import Sampling, TeacherRule
from selfdistill.training.checkpoint import checkpoint_at, list_checkpoints

MODULE = '''
from dataclasses import replace

from pydantic import Field

from selfdistill.config import Settings
from selfdistill.methods.sft import sft
from selfdistill.methods.slots import own_settings


class HalfSettings(Settings):
    weight: float = Field(default=0.5, gt=0)


def half(config):
    """*SFT* with a factor."""
    (method,) = sft(config)
    return replace(method, weight=own_settings(config, HalfSettings).weight)


def stages(config):
    return (half(config), *sft(config))


def nothing(config):
    return None


def wrong(config):
    return {}["a\\nb"]


def misspelt(config):
    (method,) = sft(config)
    return replace(method, los=1)


def worded(config):
    (method,) = sft(config)
    return replace(method, loss="jsd")


class Chosen:
    gates = True

    def __call__(self, samples, verdicts, encode):
        return samples


def chosen(config):
    (method,) = sft(config)
    return replace(method, select=Chosen())


def classy(config):
    (method,) = sft(config)
    return replace(method, checker=Chosen)


def leaves(config):
    raise SystemExit("no data")


def tempered(config):
    from selfdistill.methods.grpo import grpo
    return grpo(config)
'''
ROWS = [{"prompt": f"q{i}", "completion": "ab" * (1 + i % 4)} for i in range(6)]
RUN: dict[str, Any] = {
    **{"max_completion_length": 10, "mixed_precision": "no", "batch_size": 2, "max_steps": 2},
    **{"save_steps": 1, "drift_steps": 0, "view_rows": 0},
}
NUMBERS = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module with these methods in the current folder."""
    monkeypatch.chdir(tmp_path)
    name = f"own_methods_{next(NUMBERS)}"
    Path(f"{name}.py").write_text(MODULE, encoding="utf-8")
    importlib.invalidate_caches()
    path = list(sys.path)
    yield name
    assert sys.path == path
    sys.modules.pop(name, None)


@pytest.fixture
def model(model_folder: Callable[..., Path]) -> str:
    return str(model_folder(ends=ENDS, layers=1))


def doubled(config: sd.TrainConfig) -> tuple[Method, ...]:
    return sft(config)


def options(**values: Any) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_a_method_by_name_trains_and_resumes_and_has_its_own_settings(
    module: str, model: str, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = RUN | {"model": model, "data": write_rows(ROWS), "output_dir": "run"}
    given["method"] = f"python:{module}.half"
    assert main(["train", *options(**given), "--dry_run"]) == 0
    assert f"python:{module}.half" in capsys.readouterr().out
    assert main(["train", *options(**given), "--method_settings", '{"weight": 1}']) == 0
    assert f"python:{module}.half on 6 demonstrations" in capsys.readouterr().err
    assert yaml.safe_load(Path("run/config.yaml").read_text())["method"] == f"python:{module}.half"
    sd.train(**given | {"method": "sft", "output_dir": "sft"})
    assert same(*(final_weights(sd.Run(folder).config) for folder in ("run", "sft")))
    assert main(["train", "--resume", "--output_dir", "run", "--method", f"python:{module}.stages"]) == 2
    assert f"method was 'python:{module}.half' and is now 'python:{module}.stages'" in capsys.readouterr().err
    assert main(["train", "--resume", "--output_dir", "run", "--max_steps", "3"]) == 0
    card = Path("run/final/README.md").read_text(encoding="utf-8")
    assert f"taught by `python:{module}.half`" in card
    assert "The method is a function of its user, not one of the package." in card
    assert "*SFT*" not in card
    page = Path("page.html")
    sd.report(["run"], output=page)
    assert f"with python:{module}.half for 3 steps" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "copied", [lambda c: c.model_copy(update={"teacher": "live"}), lambda c: TrainConfig(**c.model_dump())]
)
def test_a_method_may_copy_the_settings_and_still_uses_them(copied: Callable[[Any], Any]) -> None:
    def mine(config: Any) -> tuple[Method, ...]:
        return sdft(copied(config))

    config = TrainConfig(model="m", data="d", output_dir="o", method=mine)
    assert all(uses(config, name) for name in ("context", "teacher_model", "divergence"))


def test_a_method_with_stages_shares_the_steps(module: str, model: str) -> None:
    run = sd.train(model, ROWS, output_dir="run", method=f"python:{module}.stages", **RUN)
    assert [line["loss"] > 0 for line in run.metrics] == [True, True]
    with pytest.raises(sd.UserError, match=rf"expected at least 2, one per stage of python:{module}\.stages$"):
        sd.train(model, ROWS, output_dir="one", **RUN | {"method": f"python:{module}.stages", "max_steps": 1})


def test_a_method_may_be_a_function(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = sd.train(model, ROWS, output_dir="run", method=doubled, **RUN)
    assert run.config.method == "function:doubled"
    assert "function:doubled" in str(sd.plan(model, ROWS, method=doubled, **RUN))
    with pytest.raises(sd.UserError, match=r"method was 'function:doubled' and is now 'function:<lambda \w{8}>'"):
        sd.train(output_dir="run", resume=True, method=lambda config: sft(config), max_steps=3)
    assert len(sd.train(output_dir="run", resume=True, method=doubled, max_steps=3).metrics) == 3
    begun = Path("begun/config.yaml")  # in another process, which was stopped before the first step
    begun.parent.mkdir()
    begun.write_text((run.output_dir / "config.yaml").read_text().replace("function:doubled", "function:theirs"))
    with pytest.raises(sd.UserError) as caught:
        sd.train(output_dir="begun", resume=True)
    assert str(caught.value) == (
        "method 'function:theirs': the function was given in Python, in another process; give it there again as "
        "method=theirs, or for a new run put it into a module and name it python:module.function"
    )


def test_a_scorer_and_a_method_may_have_one_name(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def scorer_of(name: str) -> Callable[[str, dict[str, Any]], bool]:
        def doubled(reply: str, row: dict[str, Any]) -> bool:
            return bool(name)

        return doubled

    def ours(config: sd.TrainConfig) -> tuple[Method, ...]:
        return grpo(config)

    ours.__name__ = "doubled"
    run = sd.train(model, ROWS, output_dir="run", method=ours, scorer=scorer_of("a"), num_generations=2, **RUN)
    assert (run.config.method, run.config.scorer) == ("function:doubled", "function:doubled")
    assert [line["reward"] for line in run.metrics] == [1, 1]


def test_methods_of_ones_own_are_compared(module: str, model: str) -> None:
    odd = eval("lambda config: sft(config)", {"sft": sft})
    methods = [f"python:{module}.half", odd, "sft"]
    values: dict[str, Any] = RUN | {"methods": methods, "seeds": [0], "save_steps": 0}
    compared = sd.compare(model, ROWS, test=ROWS, output_dir="all", **values)
    runs = compared.details["runs"]
    assert [run["method"] for run in runs][::2] == [f"python:{module}.half", "sft"]
    assert all(run["failed"] is None and Path("all", run["folder"], "final").is_dir() for run in runs)
    assert runs[0]["folder"] == f"python:{module}.half-seed0"
    assert not {*"<>/\n"} & {*runs[1]["folder"]}
    again = sd.compare(test=ROWS, output_dir="all", resume=True, methods=[odd])
    assert again.details["runs"] == json.loads(Path("all/comparison.json").read_text())["runs"]
    with pytest.raises(sd.UserError, match=r"^setting 'methods': found 'sdtf', expected: sdft, .*; did you mean sdft"):
        sd.compare(model, ROWS, test=ROWS, output_dir="none", methods=["sft", "sdtf"])


def test_arms_may_name_a_function(model: str) -> None:
    def mine(config: sd.TrainConfig) -> tuple[Method, ...]:
        return sft(config)

    config = CompareConfig(model=model, data="d", test="t", output_dir="o", arms={"a": {"method": mine}, "b": {}})
    assert config.arms == {"a": {"method": "function:mine"}, "b": {}}


def test_learn_takes_a_method_of_ones_own(module: str, model: str) -> None:
    own: dict[str, Any] = {"state": "state", "anchors": None, "max_prior_drop": 1.0, "max_skill_drop": 1.0}
    own |= {name: value for name, value in RUN.items() if name != "save_steps"}
    for name, method in (("first", f"python:{module}.half"), ("second", doubled)):
        rows = [{"prompt": f"{name} {i}", "completion": "ab"} for i in range(10)]
        more = {"model": model} if name == "first" else {}
        assert sd.learn("add", rows, name=name, method=method, **own, **more).details["accepted"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("python:nosuch_module.f", "module 'nosuch_module' cannot be imported from .*: ModuleNotFoundError: .*"),
        ("python:MODULE.haf", r".*\.py has no function 'haf'; did you mean half\?"),
        ("python:os.system", "'os' is in the standard library; name your own module"),
        ("python:MODULE.nothing", "returned None, expected a Method, or a tuple of them for stages"),
        ("python:MODULE.misspelt", r"failed \(own_methods_\d+\.py:\d+\): TypeError: .*'los'"),
        (
            "python:MODULE.worded",
            r"failed \(\w+\.py:\d+\): TypeError: slot 'loss': found 'jsd', expected Divergence or CrossEntropy",
        ),
        ("python:MODULE.chosen", r"failed \(.*\): TypeError: slot 'select': found <.*, expected Selection or None"),
        ("python:MODULE.classy", r"failed \(.*\): TypeError: slot 'checker': found <.*, expected a function or None"),
        ("python:MODULE.wrong", r"failed \(\w+\.py:\d+\): KeyError: .*"),
        ("python:MODULE.leaves", r"failed \(\w+\.py:\d+\): SystemExit: no data"),
    ],
)
def test_a_method_that_cannot_be_used_is_refused_in_one_line(
    module: str, name: str, message: str, model: str, write_rows: Callable[..., Path]
) -> None:
    name = name.replace("MODULE", module)
    data = str(write_rows(ROWS))
    for refused in (
        lambda: sd.train("no/such/model", data, output_dir="run", method=name, **RUN),
        lambda: sd.plan("no/such/model", data, method=name, **RUN),
        lambda: sd.compare("no/such/model", data, test=data, output_dir="run", methods=[name], **RUN),
        lambda: sd.learn("add", data, state="state", model="no/such/model", method=name),
    ):
        with pytest.raises(sd.UserError, match=f"^method '{name}':? {message}$"):
            refused()
    assert not Path("run").exists()
    assert not Path("state").exists()


def test_settings_of_a_method_of_ones_own_are_checked(
    module: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"python:{module}.half"
    common: dict[str, Any] = RUN | {"model": model, "data": "d", "output_dir": "run"}
    for given, message in (
        ({"method_settings": {"wight": 1}}, f"setting 'method_settings': {name} has no 'wight'; did you mean weight?"),
        (
            {"method_settings": {"weight": 0}},
            "setting 'method_settings', setting 'weight': found 0, expected: a number above 0",
        ),
        ({"weight": 1}, f"unknown setting 'weight'; write this setting of {name} as method_settings={{'weight': 1}}"),
    ):
        with pytest.raises(sd.UserError) as caught:
            sd.train(**common | {"method": name} | given)
        assert str(caught.value) == message
    assert main(["train", *options(**common, method=name), "--weight", "1"]) == 2
    shown = f"""write this setting of {name} as --method_settings '{{"weight": 1}}'"""
    assert capsys.readouterr().err.strip() == f"selfdistill: error: unknown option --weight; {shown}"
    half = importlib.import_module(module).half
    with pytest.raises(sd.UserError, match=r"^unknown setting 'weight'; write this setting of half as method_settings"):
        sd.train(**common, method=half, weight=1)
    with pytest.raises(sd.UserError, match=r"^setting 'method_settings': found weight, but method .* has no settings"):
        sd.train(**common, method=doubled, method_settings={"weight": 1})
    with pytest.raises(sd.UserError, match=r"^setting 'method': found <class 'dict'>, expected: a function, or its na"):
        sd.train(**common, method=dict)
    with pytest.raises(sd.UserError, match=r"^setting 'method': python:.*\.tempered needs untempered samples of the"):
        sd.train(**common, method=f"python:{module}.tempered", temperature=0.5)


def rewarded_and_distilled(config: sd.TrainConfig) -> Method:
    (rewarded,), (distilled,) = grpo(config), sdft(config)
    return replace(rewarded, examples=distilled.examples, also=(("sdft", replace(distilled, weight=0.5)),))


def two_rates(config: sd.TrainConfig) -> Method:
    (method,) = sdft(config)
    return replace(method, also=(("slower", replace(method, teacher=TeacherRule("ema", ema_rate=0.001))),))


def with_parts(**given: Any) -> Callable[..., Method]:
    """SFT with further parts of SFT: shares by name, and slots of all of them."""
    shares = {name: value for name, value in given.items() if isinstance(value, float | int)}
    slots = {name: value for name, value in given.items() if name not in shares}

    def mine(config: sd.TrainConfig) -> Method:
        (method,) = sft(config)
        parts = [Part(name, replace(method, **slots), share) for name, share in shares.items()]
        return replace(method, beside=tuple(parts))

    return mine


EMA, SLOWER = TeacherRule("ema"), TeacherRule("ema", ema_rate=0.001)
FOLLOWS = "but only the task's teacher follows the student; give the task the same rule, or use FROZEN here"


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        (rewarded_and_distilled, f": also 'sdft', slot 'teacher': found {EMA}, {FOLLOWS}"),
        (two_rates, f": also 'slower', slot 'teacher': found {SLOWER}, {FOLLOWS}"),
        (
            lambda config: (sdft(config)[0], replace(sdft(config)[0], teacher=FROZEN)),
            f": slot 'teacher': found {EMA} and {FROZEN} in different stages, expected one rule for all",
        ),
        (
            lambda config: replace(sdft(config)[0], teacher=None),
            ": slot 'loss': found a Divergence without a teacher; fill slot 'teacher', or use CrossEntropy()",
        ),
        (
            lambda config: replace(grpo(config)[0], relative_weights=True),
            ": slot 'relative_weights': found True without 'weighting'; give one, or leave this out",
        ),
        (
            lambda config: replace(
                sdft(config)[0], importance_cap=2.0, sequence=StudentSamples(Sampling(8, temperature=0), 1, 0)
            ),
            ": slot 'importance_cap': needs samples from the full distribution, found "
            "Sampling(max_completion_length=8, temperature=0, top_p=1.0, top_k=0); use a temperature above 0, top_p 1 "
            "and top_k 0, or leave this out",
        ),
        (
            lambda config: replace(sft(config)[0], also=("more", sft(config)[0])),
            "TypeError: slot 'also': found 'more', expected pairs, as also=(('name', method),)",
        ),
        (
            lambda config: replace(sft(config)[0], also=(sft(config)[0],)),
            "expected pairs, as also=(('name', method),)",
        ),
        (
            lambda config: replace(sft(config)[0], beside=(sft(config)[0],)),
            "expected beside=(Part('name', method, share),)",
        ),
        (
            lambda config: replace(sft(config)[0], beside=(Part("old", sft(config), 0.1),)),  # type: ignore[arg-type]
            "expected a name and a Method",
        ),
        (with_parts(old=0), "TypeError: Part 'old': found share 0, expected a number above 0, at most 1"),
        (with_parts(task=0.1), ": found two parts named 'task'; rename the method's"),
        (with_parts(**{"anchors:package": 0.1}), ": found two parts named 'anchors:package'; rename the method's"),
        (
            lambda config: replace(with_parts(old=0.1)(config), also=(("old", sft(config)[0]),)),
            ": found two parts named 'old'; rename the method's",
        ),
        (
            with_parts(old=0.7, older=0.2),
            ": found shares that leave nothing for the task (old 0.7, older 0.2, anchors:package 0.1), expected a sum "
            "below 1; lower them or anchor_share",
        ),
        (
            with_parts(old=0.1, teacher=EMA),
            f": part 'old', slot 'teacher': found {EMA}, {FOLLOWS}",
        ),
        (
            with_parts(old=0.1, controller=HintSchedule(0, 1)),
            ": part 'old', slot 'controller': only the task's is used; leave it out here",
        ),
        (
            with_parts(old=0.1, also=(("more", sft(TrainConfig(model="m", data="d", output_dir="o"))[0]),)),
            ": part 'old', slot 'also': only the task's is used; leave it out here",
        ),
    ],
)
def test_slots_that_do_not_fit_together_are_refused(method: Callable[..., Any], problem: str) -> None:
    with pytest.raises(sd.UserError) as caught:
        sd.plan("no/such/model", ROWS, method=method, anchors="package", anchor_share=0.1, **RUN)
    assert str(caught.value).startswith("method 'function:")
    assert str(caught.value).endswith(problem)


def test_what_a_teacher_may_do_beside_the_task_is_not_refused() -> None:
    def mine(config: Any) -> Method:
        (rewarded,), (distilled,) = grpo(config), sdft(config)
        task = replace(rewarded, examples=distilled.examples, teacher=distilled.teacher)
        return replace(task, also=(("sdft", distilled), ("frozen", replace(distilled, teacher=FROZEN))))

    assert uses(TrainConfig(model="m", data="d", output_dir="o", method=mine), "ema_rate")


def from_zero(config: sd.TrainConfig) -> Method:
    def loss_at(step: int, steps: int) -> Divergence:
        return Divergence(pull=0.1 * step / steps)

    return replace(sdft(config)[0], loss=loss_at(0, 1), loss_at=loss_at)


def half_done(config: sd.TrainConfig) -> Method:
    return replace(sdft(config)[0], loss_at=lambda step, steps: Divergence() if step < steps / 2 else None)


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        (
            lambda config: replace(grpo(config)[0], select=None, loss=Divergence(), teacher=FROZEN),
            r": slot 'examples' of part 'task': no context for the teacher in .*; use examples with one, as .*",
        ),
        (
            lambda config: replace(sft(config)[0], teacher=FROZEN),
            r": slot 'examples' of part 'task': no context for the teacher in .*",
        ),
        (
            from_zero,
            r": slot 'loss_at' at step 1 of 2: found a loss that needs the model before training, but 'loss' does not; "
            r"set weighs_base=True",
        ),
        (half_done, r": slot 'loss_at' at step 1 of 2: found None, expected Divergence or CrossEntropy"),
        (
            lambda config: replace(sft(config)[0], loss_at=lambda step, steps: [CrossEntropy()][step]),
            r" failed \(test_own\.py:\d+\): IndexError: list index out of range",
        ),
        (
            lambda config: replace(sft(config)[0], loss_at=lambda step: CrossEntropy()),
            r" failed \(own\.py:\d+\): TypeError: .* takes 1 positional argument but 2 were given",
        ),
    ],
)
def test_a_mistake_found_with_the_data_begins_no_folder(
    method: Callable[..., Any], problem: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sd.UserError, match=f"^method 'function:.*'{problem}$"):
        sd.train(model, ROWS, output_dir="run", method=method, **RUN)
    assert not Path("run").exists()


def test_a_pull_that_grows_from_zero_may_be_announced(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def announced(config: sd.TrainConfig) -> Method:
        return replace(from_zero(config), weighs_base=True)

    assert len(sd.train(model, ROWS, output_dir="run", method=announced, **RUN).metrics) == 2


class Selected(GroupAdvantages):
    """Selects with a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "function", function)

    def __call__(self, samples: Any, verdicts: Any, encode: Any) -> Any:
        return self.function(samples)  # type: ignore[attr-defined]


class OwnLoss(CrossEntropy):
    """What a function makes of the log-probabilities."""

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "function", function)

    def from_log_probs(self, log_p_NV: Any, log_q_NV: Any, tokens_N: Any) -> Any:
        return self.function(log_p_NV)  # type: ignore[attr-defined]


def rewarding(**slots: Any) -> Callable[..., Method]:
    def mine(config: sd.TrainConfig) -> Method:
        return replace(grpo(config)[0], **slots)

    return mine


@pytest.mark.parametrize(
    ("slots", "problem"),
    [
        (
            {"checker": lambda samples, chat: [1.0 for _ in samples]},
            r": slot 'checker': returned 1\.0, expected a list of Verdict",
        ),
        (
            {"checker": lambda samples, chat: [Verdict(1.0)] * 2 * len(samples)},
            r": slot 'checker': returned 8 verdicts on 4 samples, expected one on each, in their order",
        ),
        (
            {"checker": lambda samples, chat: [Verdict(1.0)]},
            r": slot 'checker': returned 1 verdict on 4 samples, expected one on each, in their order",
        ),
        ({"select": Selected(lambda samples: None)}, r": slot 'select': returned None, expected a list of Completion"),
        ({"select": Selected(lambda samples: [0, 2])}, r": slot 'select': returned 0, expected a list of Completion"),
        (
            {"select": Selected(lambda samples: samples), "teacher": FROZEN},
            r": slot 'select': a sample of .* has no context for the teacher; set teacher_ids of its example, or .*",
        ),
        (
            {"select": Selected(lambda samples: samples), "weighting": lambda pair, tokens: pair.log_p_NV},
            r"slot 'weighting': returned shape \(\d+, \d+\), expected one factor per token, shape \(n,\)",
        ),
        (
            {"select": Selected(lambda samples: samples), "weighting": lambda pair, tokens: None},
            r"slot 'weighting': returned None, expected one factor per token, shape \(n,\)",
        ),
        (
            {"select": Selected(lambda samples: samples), "loss": OwnLoss(lambda log_p: -log_p.mean())},
            r"slot 'loss': returned shape \(\), expected one value per token, shape \(n,\)",
        ),
        (
            {"select": Selected(lambda samples: samples), "loss": OwnLoss(lambda log_p: -log_p.detach()[:, 0])},
            r"slot 'loss': returned values without a gradient, expected ones that depend on log_p_NV",
        ),
        (
            {"select": Selected(lambda samples: samples), "weighting": lambda pair, tokens: pair.p_VN},
            r" failed \(test_own\.py:\d+\): AttributeError: 'Pair' object has no attribute 'p_VN'",
        ),
    ],
)
def test_a_mistake_in_a_step_is_one_line(
    slots: dict[str, Any], problem: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sd.UserError, match=f"^(method 'function:mine')?{problem}$"):
        sd.train(model, ROWS, output_dir="run", method=rewarding(**slots), num_generations=2, **RUN)
    with pytest.raises(sd.UserError, match=f"^(method 'function:mine')?{problem}$"):
        sd.plan(model, ROWS, method=rewarding(**slots), num_generations=2, **RUN)


def test_code_that_fails_in_a_step_loses_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_rows: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    fails = [False, True, False]

    def checker(samples: Any, chat: Any) -> list[Verdict]:
        return [{False: Verdict(float(n % 2))}[fails[0]] for n, _ in enumerate(samples)]

    def moved(*_: Any) -> bool:
        fails.append(fails.pop(0))
        return False

    given: dict[str, Any] = RUN | {"save_steps": 0, "max_steps": 3, "num_generations": 2}
    given |= {"model": model, "data": str(write_rows(ROWS)), "method": rewarding(checker=checker)}
    whole = sd.train(**given, output_dir="whole")
    with pytest.raises(sd.UserError, match=r"^method 'function:mine' failed \(test_own\.py:\d+\): KeyError: True$"):
        sd.train(**given, output_dir="run", on_step=moved)
    assert list_checkpoints(Path("run")) == [checkpoint_at(Path("run"), 1)]
    fails[:] = [False]
    run = sd.train(output_dir="run", resume=True, method=given["method"])
    assert same(*(final_weights(one.config) for one in (whole, run)))


def test_a_controller_that_fails_after_the_update_saves_no_step_that_is_half_done(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    class Failing(HintSchedule):
        def applied(self, method: Method, value: float) -> Method:
            return method

        def update(self, state: Any, metrics: dict[str, Any], step: int, steps: int) -> Any:
            return state if step == 0 else metrics["los"]

    given: dict[str, Any] = RUN | {"save_steps": 0, "method": rewarding(controller=Failing(0, 1))}
    with pytest.raises(sd.UserError, match=r"^method 'function:mine' failed \(test_own\.py:\d+\): KeyError: 'los'$"):
        sd.train(model, ROWS, output_dir="run", num_generations=2, **given)
    assert list_checkpoints(Path("run")) == []
