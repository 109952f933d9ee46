"""Models of fake tensors: what they do with the files of the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from selfdistill.model.fake import fake_model


def test_a_starter_model_is_converted_with_its_weights(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan may be the first to need it; on the meta device transformers refuses to read its GGUF file."""
    devices = []

    def converted(name: str) -> Path:
        devices.append(torch.empty(0).device.type)
        return model_folder()

    monkeypatch.setattr("selfdistill.model.files.starter_model_path", converted)
    fake_model("smollm2-135m", dtype="float32")
    assert devices == ["cpu"]
