"""Models of the hub in the local cache: what is refused, and that nothing else is asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from picture_models import FAMILIES

from selfdistill.errors import UserError
from selfdistill.model.loading import load_model

NAME = "someone/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@pytest.fixture
def cached(model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put the tiny model, or another, into the hub's cache; returns its files.

    Some files are left out, and the hub is known to lack them.
    """

    def make(*lacks: str, folder: Path | None = None) -> Path:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        repository = tmp_path / "cache" / "models--someone--model"
        snapshot = repository / "snapshots" / COMMIT
        shutil.copytree(folder or model_folder(), snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        (repository / ".no_exist" / COMMIT).mkdir(parents=True)
        for name in lacks:
            (snapshot / name).unlink(missing_ok=True)
            (repository / ".no_exist" / COMMIT / name).touch()
        return snapshot

    return make


def refused() -> str:
    with pytest.raises(UserError) as caught:
        load_model(NAME)
    assert "\n" not in str(caught.value)
    return str(caught.value)


ANSWER: Any = SimpleNamespace(headers={}, request=None)
"""Of the hub."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            GatedRepoError("no access", response=ANSWER),
            f"the model hub refuses access; accept the terms at https://huggingface.co/{NAME}, then run hf auth login",
        ),
        (
            LocalEntryNotFoundError("no connection"),
            "no such folder, and the model hub cannot be reached; give a folder",
        ),
        (
            RepositoryNotFoundError("no such repository", response=ANSWER),
            "no such folder, and not found on the model hub, or private there (hf auth login); give a folder",
        ),
    ],
    ids=["gated", "unreachable", "unknown"],
)
def test_why_the_hub_gives_no_model_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", download)
    monkeypatch.setattr("selfdistill.model.weights.is_offline_mode", lambda: False)
    assert refused().startswith(f"model '{NAME}': {said}")


def test_a_model_in_the_cache_is_loaded(cached: Callable[..., Path]) -> None:
    files = cached()
    loaded = load_model(NAME)
    assert loaded.files == files
    assert loaded.notes == []


def test_no_service_is_asked_to_convert_pickled_weights(
    cached: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(*WEIGHTS)
    before = dict(os.environ)
    monkeypatch.setattr("transformers.modeling_utils.is_offline_mode", lambda: False)
    monkeypatch.setattr("transformers.modeling_utils.auto_conversion", lambda *_, **__: pytest.fail("was asked"))
    assert refused() == (
        f"model '{NAME}': it has no safetensors on the model hub, and pickled weights (.bin) are never read, because "
        "they can run code; convert them to safetensors"
    )
    assert dict(os.environ) == before


@pytest.mark.parametrize("lacks", [(), ("config.json", *WEIGHTS)], ids=["with config.json", "without"])
def test_an_adapter_of_the_hub_is_refused(cached: Callable[..., Path], lacks: tuple[str, ...]) -> None:
    (cached(*lacks) / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')
    assert refused() == f"model '{NAME}': an adapter on the model hub; download it, and give its folder"


@pytest.fixture
def processor(
    cached: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[bool], list[str]]:
    """An image-text model in the cache without its processor's file; returns what is asked of the hub from then on."""
    FAMILIES[0].write(tmp_path / "llava")
    snapshot = cached(folder=tmp_path / "llava")
    file = snapshot / "processor_config.json"
    text = file.read_text(encoding="utf-8")
    file.unlink()

    def begin(reached: bool) -> list[str]:
        asked = []

        def download(path: str, name: str) -> str:
            asked.append(f"{path}/{name}")
            if not reached or name != file.name:
                raise LocalEntryNotFoundError("not reached, or not there")
            file.write_text(text, encoding="utf-8")
            return str(file)

        monkeypatch.setattr("selfdistill.model.pictures.hf_hub_download", download)
        return asked

    return begin


def test_the_processor_of_an_image_text_model_is_downloaded_first(processor: Callable[[bool], list[str]]) -> None:
    asked = processor(True)
    assert load_model(NAME).pictures is not None
    assert asked == [f"{NAME}/processor_config.json", f"{NAME}/preprocessor_config.json"]
    assert load_model(NAME).pictures is not None
    assert len(asked) == 2, "nothing is asked for again"


def test_an_image_text_model_without_its_processor_is_one_line(processor: Callable[[bool], list[str]]) -> None:
    processor(False)
    assert refused() == (
        f"model '{NAME}': LlavaForConditionalGeneration is an image-text model, and the files of its processor are "
        "missing (processor_config.json or preprocessor_config.json); download the whole model"
    )
