"""What the passes decide by the kind of device, on a CPU that is taken for a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from selfdistill.model.device import any_length


@pytest.fixture
def cudnn_attention() -> Iterator[None]:
    """As it is on a GPU."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.usefixtures("cudnn_attention")
@pytest.mark.parametrize(("kind", "inside"), [("cuda", False), ("cpu", True)])
def test_cudnn_plans_no_attention_where_lengths_change(kind: str, inside: bool) -> None:
    with any_length(kind):
        assert torch.backends.cuda.cudnn_sdp_enabled() is inside
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.usefixtures("cudnn_attention")
def test_cudnn_attention_is_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="no memory"), any_length("cuda"):
        raise RuntimeError("no memory")
    assert torch.backends.cuda.cudnn_sdp_enabled()
