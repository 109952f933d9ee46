"""Models: what is changed when one is loaded."""

from __future__ import annotations

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel

from selfdistill.model.loading import disable_dropout

SHAPE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("kind", ["falcon", "bloom", "gpt2"])
def test_without_dropout_train_mode_changes_no_number(kind: str) -> None:
    if kind == "falcon":
        model = FalconForCausalLM(FalconConfig(**SHAPE, hidden_dropout=0.5, attention_dropout=0.5))
    elif kind == "bloom":
        model = BloomForCausalLM(
            BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.5, attention_dropout=0.5)
        )
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2))
    before = model.config.to_dict()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        assert not torch.equal(model.train()(input_ids=ids).logits, expected)
        disable_dropout(model)
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert model.config.to_dict() == before  # it is saved with the model
