"""Models: what is changed when one is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from odd_models import long_rope
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import tokenization_auto

from selfdistill.errors import UserError
from selfdistill.model import STARTER_MODELS
from selfdistill.model.files import resolve
from selfdistill.model.loading import LoadedModel, adopt, disable_dropout, load_model, load_tokenizer
from selfdistill.model.vllm_engine import longest_sequence

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


@pytest.mark.parametrize("inside", ["final", "."])
def test_a_model_folder_named_like_the_starter_model_is_not_passed_over(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    monkeypatch.setenv("SELFDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    name, folder = "smollm2-135m", Path("smollm2-135m") / inside
    starter = tmp_path / "cache" / f"{name}-{STARTER_MODELS[name].version}"
    shutil.copytree(model_folder(), starter)
    Path(name).mkdir()  # of a run that is not at its end
    assert load_model(name).files == starter
    shutil.copytree(model_folder(), folder, dirs_exist_ok=True)
    with pytest.raises(UserError) as caught:
        load_model(name)
    assert str(caught.value) == (
        "model 'smollm2-135m': the starter model, and a folder here; give ./smollm2-135m for the folder, or rename it "
        "to use the starter model"
    )
    assert load_model(f"./{name}").files == folder


def test_an_adapter_on_the_starter_model_is_read_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfdistill.model.files.starter_model_path", lambda name: tmp_path / "here" / name)
    there = str(tmp_path / "home" / ".cache" / "selfdistill" / "smollm2-135m-0.1.2")  # as its settings name it
    assert resolve(there) == str(tmp_path / "here" / "smollm2-135m")
    with pytest.raises(UserError, match="no such folder"):
        resolve(there.replace("0.1.2", "0.0.9"))  # other weights
    Path(there, "final").mkdir(parents=True)
    assert resolve(there) == f"{there}/final"


# --- tokenizers of Mistral ---


@pytest.fixture
def tekken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tokenizer as transformers 4 saved Mistral's, with a pattern of its own, where mistral-common is installed."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", *(f"unused {i}" for i in range(100_000))]
    core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[("1", "2")]))
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), behavior="isolated")  # Mistral's own divides digits
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    config = {"model_type": "mistral", "transformers_version": "4.57.0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, "mistral", "MistralCommonBackend")
    monkeypatch.setattr(tokenization_auto, "_use_mistral_format", lambda *_, **__: pytest.fail("mistral-common"))
    return str(tmp_path)


def test_mistrals_tokenizers_are_read_from_tokenizer_json_with_the_right_pattern(tekken: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tekken, tekken, "m", "mistral")
    assert tokenizer.convert_ids_to_tokens(tokenizer("12")["input_ids"]) == ["1", "2"]
    tokenizer.save_pretrained(tmp_path / "saved")  # beside an adapter, without config.json
    again = load_tokenizer(str(tmp_path / "saved"), tekken, "m", "mistral")
    assert again.convert_ids_to_tokens(again("12")["input_ids"]) == ["1", "2"]


def test_mistrals_tokenizers_are_read_without_an_option_that_an_early_release_refuses(
    tekken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = AutoTokenizer.from_pretrained

    def early(path: str, **options: Any) -> Any:
        if options.pop("fix_mistral_regex", False):
            raise TypeError("got multiple values for keyword argument 'fix_mistral_regex'")
        monkeypatch.undo()
        return real(path, **options)

    monkeypatch.setattr(tokenization_auto, "_use_mistral_format", lambda *_, **__: False)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", early)
    assert load_tokenizer(tekken, tekken, "m", "mistral").convert_ids_to_tokens([0])


def test_a_tokenizer_that_is_not_mistrals_own_stays_as_it_is(
    tekken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tekken.json").unlink()
    monkeypatch.setattr(tokenization_auto, "_use_mistral_format", lambda *_, **__: False)
    tokenizer = load_tokenizer(tekken, tekken, "m", "mistral")
    assert tokenizer.convert_ids_to_tokens(tokenizer("12")["input_ids"]) == ["12"]


class MistralCommonBackend:
    """What the class of transformers says of control tokens."""

    def apply_chat_template(self) -> None: ...

    def added_tokens_decoder(self) -> None:
        raise NotImplementedError

    def get_vocab(self) -> dict[str, Any]:
        return {}


def test_a_tokenizer_that_does_not_tell_its_control_tokens_is_refused(load: Callable[..., LoadedModel]) -> None:
    with pytest.raises(UserError) as caught:
        adopt(load().model, MistralCommonBackend(), "mine")
    assert str(caught.value) == (
        "model 'mine': MistralCommonBackend does not list its control tokens; load the tokenizer with "
        "AutoTokenizer.from_pretrained(..., fix_mistral_regex=True), which reads tokenizer.json"
    )


# --- the tokens that end a reply ---


def test_the_token_that_the_template_writes_after_a_reply_ends_it(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} <|stop|>\n{% endfor %}"
    loaded = load(template=template)  # generation_config.json and tokenizer name <|im_end|>, 257
    assert loaded.end_token_ids == (257, 259)
    assert loaded.chat().encode_completion("a")[-1] == 259
    assert any("ends replies with '<|stop|>'" in note for note in loaded.notes)
    loaded.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [257, 259]
    again = load(template=template)
    assert again.end_token_ids == (257, 259)


@pytest.mark.parametrize("saved", [None, 256])
def test_an_end_token_that_only_the_tokenizer_names_is_saved(
    saved: int | None, model_folder: Callable[..., Path]
) -> None:
    """Else `generate` of the saved model would not stop there."""
    model = AutoModelForCausalLM.from_pretrained(folder := model_folder())
    model.generation_config.eos_token_id = saved
    loaded = adopt(model, AutoTokenizer.from_pretrained(folder))
    assert loaded.end_token_ids[-1] == 257
    assert model.generation_config.eos_token_id == list(loaded.end_token_ids)
    assert any("here and in saved models" in note for note in loaded.notes)


def test_a_template_that_writes_the_end_token_changes_nothing(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    assert loaded.end_token_ids == (257,)
    assert loaded.notes == []


def test_a_template_that_ends_no_reply_is_told(load: Callable[..., LoadedModel]) -> None:
    loaded = load(template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert loaded.end_token_ids == (257,)
    assert loaded.notes == ["the chat template writes no control token after a reply; replies end with '<|im_end|>'"]


def test_a_model_without_any_other_end_token_takes_the_templates(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder().iterdir():
        text = file.read_bytes()
        if file.suffix == ".json" and file.name != "tokenizer.json":
            values = {k: v for k, v in json.loads(text).items() if k not in ("eos_token", "eos_token_id")}
            text = json.dumps(values).encode()
        (folder / file.name).write_bytes(text)
    assert load_model(str(folder)).end_token_ids == (257,)


def test_a_model_with_longrope_is_limited_to_its_first_frequencies(
    tmp_path: Path, load: Callable[..., LoadedModel]
) -> None:
    long_rope(first=64, window=512).save_pretrained(tmp_path / "model")
    load().tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    assert loaded.window == 64
    assert loaded.notes == [
        "prompt plus completion may have 64 of the model's 512 tokens: with more, LongRoPE changes the frequencies of "
        "all positions in a batch"
    ]
    assert longest_sequence(loaded) == 64
    assert longest_sequence(load()) == -1
    assert adopt(long_rope(first=64, window=64), load().tokenizer).notes == []
