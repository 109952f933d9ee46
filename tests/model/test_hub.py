"""Models of the hub in the local cache: what is refused, and that nothing else is asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from selfdistill.errors import UserError
from selfdistill.model.loading import load_model

NAME = "someone/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@pytest.fixture
def cached(model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put the tiny model into the hub's cache without some files, which the hub is known to lack; returns the files."""

    def make(*lacks: str) -> Path:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        repository = tmp_path / "cache" / "models--someone--model"
        snapshot = repository / "snapshots" / COMMIT
        shutil.copytree(model_folder(), snapshot)
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
