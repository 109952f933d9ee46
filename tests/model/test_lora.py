"""LoRA on models whose layers are not all alike: what gets an adapter, and that it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from odd_models import ODD_LAYERS, SIZE
from transformers import LlamaConfig, LlamaForCausalLM

from selfdistill.errors import UserError
from selfdistill.model import LoadedModel, add_lora, describe_lora

Loader = Callable[..., LoadedModel]


@pytest.mark.parametrize("name", sorted(ODD_LAYERS))
def test_all_layers_that_can_be_adapted_are_and_the_others_are_named(load: Loader, name: str) -> None:
    make, expected = ODD_LAYERS[name]
    loaded = replace(load(), model=make().eval())
    ids_BL = torch.arange(40, 52)[None]
    with torch.no_grad():
        before = loaded.model(input_ids=ids_BL, use_cache=False).logits
    add_lora(loaded, 4, None, seed=0)
    assert describe_lora(loaded) == expected
    after = loaded.model(input_ids=ids_BL, use_cache=False).logits
    torch.testing.assert_close(after, before)
    after.square().sum().backward()
    trained = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    learnt = [name for name, p in trained.items() if "lora_B" in name and p.grad is not None and p.grad.any()]
    assert len(learnt) == len(trained) / 2, "every layer with an adapter gets a gradient"


def test_a_model_without_layers_to_adapt_is_refused_in_one_line(load: Loader) -> None:
    loaded = replace(load(), model=LlamaForCausalLM(LlamaConfig(**SIZE | {"num_hidden_layers": 0})), name="m")
    with pytest.raises(UserError, match=r"^setting 'lora_rank': model 'm' cannot be adapted: [^\n]*; leave it out, or"):
        add_lora(loaded, 4, None, seed=0)
