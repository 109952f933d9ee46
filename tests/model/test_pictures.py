"""Image-text models: token ids as the processor has them, and each token scored and sampled as by the plain model."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import gradients, largest_difference
from picture_models import ALL, FAMILIES, PictureFamily, is_vision
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import selfdistill
from selfdistill.cli import main
from selfdistill.data import Demonstration, Example, encode, load_demonstrations, parse_context
from selfdistill.data.shapes import COLOURS, draw_shape
from selfdistill.errors import UserError
from selfdistill.model import ForwardPass, LoadedModel, Sampling, add_lora, freeze_vision, load_model, sample
from selfdistill.model.picture_features import Recent
from selfdistill.model.pictures import PictureInputs
from selfdistill.model.prefix_cache import common_prefix_length

Folder = Callable[[PictureFamily], Path]
SIZES = ((40, 60), (100, 50), (32, 32))
LIMITS: dict[str, Any] = {"max_prompt_length": None, "max_completion_length": 16, "window": None}
family = pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made: dict[str, Path] = {}

    def folder(family: PictureFamily) -> Path:
        if family.name not in made:
            made[family.name] = tmp_path_factory.mktemp(family.name)
            family.write(made[family.name])
        return made[family.name]

    return folder


def rows() -> list[dict[str, Any]]:
    """Rows with pictures of several sizes: one, two within the text, and none."""
    one, two, three = (draw_shape(COLOURS[i], "circle", size) for i, size in enumerate(SIZES))
    parts = [{"type": "text", "text": "Is"}, {"type": "image"}, {"type": "text", "text": " like "}, {"type": "image"}]
    return [
        {"prompt": "What colour is it?", "completion": "red", "images": [one]},
        {"prompt": [{"role": "user", "content": parts}], "completion": "no, it is not", "images": [two, three]},
        {"prompt": "How are you?", "completion": "Well"},
    ]


def encoded(loaded: LoadedModel, context: str | None = None) -> list[Example]:
    shown = None if context is None else parse_context(context)
    limits: dict[str, Any] = {"max_prompt_length": None, "max_completion_length": 16, "window": loaded.window}
    return encode(load_demonstrations(rows()), shown, loaded.chat(), **limits)[0]


def by_processor(folder: Path, demonstration: Demonstration, messages: Sequence[Any], copies: int = 1) -> Any:
    """What the family's own processor makes of some messages whose content is in parts."""
    images = [picture.decoded() for picture in demonstration.images] * copies
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=images or None, return_tensors="pt")


def in_parts(row: dict[str, Any]) -> list[Any]:
    if isinstance(row["prompt"], list):
        return list(row["prompt"])
    place = [{"type": "image"}] * len(row.get("images", []))
    return [{"role": "user", "content": [*place, {"type": "text", "text": row["prompt"]}]}]


def plain_log_probs(model: Any, inputs: Any, completion: Sequence[int]) -> Tensor:
    """Log-probabilities (T, V) of the plain model, which is given the row alone."""
    ids = torch.tensor([completion])
    inputs = dict(inputs)
    length = inputs["input_ids"].shape[1]
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(ids)], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    logits_LV = model(**inputs).logits[0].double()
    return logits_LV[length - 1 : -1].log_softmax(-1)


@family
def test_prompts_are_those_of_the_processor(family: PictureFamily, folder_of: Folder) -> None:
    folder = folder_of(family)
    for row, example in zip(rows(), encoded(load_model(str(folder))), strict=True):
        expected = by_processor(folder, example.demonstration, in_parts(row))
        assert example.student_ids == expected["input_ids"][0].tolist()


def test_a_split_picture_has_as_many_tokens_as_the_docs_say(folder_of: Folder) -> None:
    (idefics3,) = (family for family in FAMILIES if family.name == "idefics3")
    loaded = load_model(str(folder_of(idefics3)))
    said = "".join(map(loaded.tokenizer.decode, encoded(loaded)[0].student_ids))
    tiles, length = said.count("<row_"), 4
    assert tiles > 1
    found = len(re.findall("<(?:image|fake_token_around_image|global-img|row_[0-9]_col_[0-9])>", said))
    assert found == (tiles + 1) * (length + 2) + 1
    page = Path(__file__).parents[2] / "docs" / "pictures.md"
    assert "(n + 1) (`image_seq_len` + 2) + 1 and line breaks" in page.read_text(encoding="utf-8")


@family
def test_the_teacher_sees_the_picture_again(family: PictureFamily, folder_of: Folder) -> None:
    folder = folder_of(family)
    row, example = rows()[0], encoded(load_model(str(folder)), "turns")[0]
    reply = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    messages = [*in_parts(row), reply, *in_parts(row)]
    expected = by_processor(folder, example.demonstration, messages, copies=2)
    assert example.teacher_ids == expected["input_ids"][0].tolist()


@family
def test_the_name_of_a_picture_token_is_no_picture(family: PictureFamily, folder_of: Folder) -> None:
    loaded = load_model(str(folder_of(family)))
    assert loaded.pictures is not None
    names = [loaded.pictures.token, loaded.tokenizer.convert_ids_to_tokens(loaded.pictures.token_id)]
    row = {"prompt": f"What is {' or '.join(names)}?", "completion": "a"}
    seen = {**row, "images": [draw_shape("red", "square")]}
    bare, pictured = (load_demonstrations([one])[0] for one in (row, seen))
    options: dict[str, Any] = {"max_prompt_length": None, "max_completion_length": 8, "window": None}
    (without,), _ = encode([bare], None, loaded.chat(), **options)
    (with_one,), _ = encode([pictured], None, loaded.chat(), **options)
    assert loaded.pictures.token_id not in without.student_ids
    shown = encoded(loaded)[0].student_ids
    assert 0 < with_one.student_ids.count(loaded.pictures.token_id) <= shown.count(loaded.pictures.token_id)


@family
@pytest.mark.parametrize("context", [None, "turns"])
def test_each_token_is_scored_as_by_the_plain_model(
    family: PictureFamily, folder_of: Folder, context: str | None
) -> None:
    folder = folder_of(family)
    loaded = load_model(str(folder))
    plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
    examples = encoded(loaded, context)
    prompts = [x.student_ids if context is None else x.teacher_ids or [] for x in examples]
    with torch.no_grad():
        output = ForwardPass(loaded)(loaded.model, prompts, [x.completion_ids for x in examples])
        found = output.head(output.hidden_ND).double().log_softmax(-1).split([len(x.completion_ids) for x in examples])
        for row, example, own in zip(rows(), examples, found, strict=True):
            reply = {"role": "assistant", "content": [{"type": "text", "text": row["completion"]}]}
            messages = in_parts(row) if context is None else [*in_parts(row), reply, *in_parts(row)]
            inputs = by_processor(folder, example.demonstration, messages, copies=1 if context is None else 2)
            expected = plain_log_probs(plain, inputs, example.completion_ids)
            assert float((own - expected).abs().max()) < 1e-4


@family
def test_loss_and_gradients_are_those_of_the_plain_model(family: PictureFamily, folder_of: Folder) -> None:
    folder = folder_of(family)
    loaded = load_model(str(folder))
    plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
    examples = encoded(loaded)
    output = ForwardPass(loaded)(loaded.model, [x.student_ids for x in examples], [x.completion_ids for x in examples])
    tokens = torch.tensor([token for x in examples for token in x.completion_ids])
    torch.nn.functional.cross_entropy(output.head(output.hidden_ND), tokens, reduction="sum").backward()
    for row, example in zip(rows(), examples, strict=True):
        inputs = by_processor(folder, example.demonstration, in_parts(row))
        logp_TV = plain_log_probs(plain, inputs, example.completion_ids)
        (-logp_TV.gather(1, torch.tensor(example.completion_ids)[:, None]).sum()).backward()
    found, expected = gradients(loaded.model), gradients(plain)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert any(map(is_vision, found))
    assert largest_difference(found, expected) < 1e-4 * scale


def assert_like_the_plain_model(
    folder: Path, loaded: LoadedModel, raw: Sequence[dict[str, Any]], tokens: int | None = None
) -> None:
    """Scores, loss and gradients of the rows, and how many tokens the language model read, unless that is None."""
    examples = encode(load_demonstrations(raw), None, loaded.chat(), **LIMITS)[0]
    plain, forward_pass = AutoModelForImageTextToText.from_pretrained(folder).eval(), ForwardPass(loaded)
    read: list[int] = []
    hook = loaded.model.get_input_embeddings().register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    completions = [x.completion_ids for x in examples]
    output = forward_pass(loaded.model, [x.student_ids for x in examples], completions)
    hook.remove()
    logits_NV = output.head(output.hidden_ND)
    ids_N = torch.tensor([token for ids in completions for token in ids])
    torch.nn.functional.cross_entropy(logits_NV, ids_N, reduction="sum").backward()
    scored = logits_NV.double().log_softmax(-1).split([len(ids) for ids in completions])
    for row, example, own_TV in zip(raw, examples, scored, strict=True):
        inputs = by_processor(folder, example.demonstration, in_parts(row))
        expected_TV = plain_log_probs(plain, inputs, example.completion_ids)
        (-expected_TV.gather(1, torch.tensor(example.completion_ids)[:, None]).sum()).backward()
        assert float((own_TV - expected_TV).detach().abs().max()) < 1e-4
    found = gradients(loaded.model)
    expected = {name: gradient for name, gradient in gradients(plain).items() if name in found}
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest_difference(found, expected) < 1e-4 * scale
    if tokens is not None:
        assert sum(read) == tokens
    loaded.model.zero_grad()


@family
def test_kept_features_are_those_of_the_plain_model(family: PictureFamily, folder_of: Folder) -> None:
    folder = folder_of(family)
    loaded, fresh = (load_model(str(folder)) for _ in range(2))
    assert loaded.pictures is not None
    freeze_vision(loaded.model)
    loaded.pictures.keep_features(True)
    read: list[int] = []
    features = loaded.model.base_model.get_image_features

    @wraps(features)
    def counted(*args: Any, **seen: Any) -> Any:
        read.append(1)
        return features(*args, **seen)

    loaded.model.base_model.get_image_features = counted
    for _ in range(2):
        assert_like_the_plain_model(folder, loaded, rows())
    prompts = [x.student_ids for x in encoded(loaded)]
    assert sample(loaded, prompts, Sampling(8, temperature=0.0)) == sample(fresh, prompts, Sampling(8, temperature=0.0))
    assert len(read) == 3
    for weight in loaded.model.base_model.parameters():
        weight.data.mul_(1.1)
    loaded.pictures.keep_features(True)
    with torch.no_grad():
        own, other = (
            ForwardPass(fresh)(loaded.model, prompts, [[65]] * 3),
            ForwardPass(loaded)(loaded.model, prompts, [[65]] * 3),
        )
    assert len(read) == 3 + 1 + 3
    assert torch.allclose(own.hidden_ND, other.hidden_ND, atol=1e-4)


@family
def test_rows_with_the_same_pictures_share_what_they_begin_with(family: PictureFamily, folder_of: Folder) -> None:
    folder = folder_of(family)
    loaded = load_model(str(folder))
    red, blue = (draw_shape(colour, "circle", (40, 60)) for colour in ("red", "blue"))
    raw = [
        {"prompt": f"What is it that you see there, {word}?", "completion": word, "images": [picture]}
        for word in ("dear", "my friend", "sir")
        for picture in (red, blue)
    ]
    raw += [{"prompt": "What is it that you see?", "completion": word} for word in ("no", "nothing", "not a thing")]
    ids = [x.student_ids for x in encode(load_demonstrations(raw), None, loaded.chat(), **LIMITS)[0]]
    assert ids[0] == ids[1]
    tokens = None
    if family in FAMILIES:  # the others compute positions themselves, so they read each row whole
        common = min(common_prefix_length(ids[0], other) for other in (ids[2], ids[4]))
        shared = 2 * common, len(ids[6]) - 1
        rest = [max(len(ids[n]) - common + len(raw[n]["completion"]) + 1 for n in (0, 2, 4)), 2 + len("not a thing")]
        tokens = sum(shared) + 2 * 3 * rest[0] + 3 * rest[1]
    assert_like_the_plain_model(folder, loaded, raw, tokens)


def test_the_values_that_were_used_last_are_kept() -> None:
    recent: Recent[dict[str, Tensor]] = Recent(1000)
    made: list[str] = []

    def make(key: str) -> dict[str, Tensor]:
        made.append(key)
        return {"value": torch.zeros(1001 if key == "large" else 400, dtype=torch.uint8)}

    for key in ("a", "b", "a", "c", "a", "b", "large", "large"):
        recent(key, partial(make, key))
    assert made == ["a", "b", "c", "b", "large", "large"]


def plain_reply(plain: Any, loaded: LoadedModel, inputs: Any) -> list[int]:
    """The greedy reply of the plain model, at most 12 tokens."""
    assert loaded.pictures is not None
    ids = plain.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=list(loaded.end_token_ids),
        pad_token_id=loaded.pad_token_id,
        suppress_tokens=[loaded.pictures.token_id],
    )
    found: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return found


@family
def test_greedy_samples_are_those_of_generate(family: PictureFamily, folder_of: Folder) -> None:
    folder = folder_of(family)
    loaded = load_model(str(folder))
    plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
    examples = encoded(loaded)
    rollouts = sample(loaded, [x.student_ids for x in [*examples, examples[0]]], Sampling(12, temperature=0.0))
    for row, example, rollout in zip([*rows(), rows()[0]], [*examples, examples[0]], rollouts, strict=True):
        inputs = by_processor(folder, example.demonstration, in_parts(row))
        assert rollout.ids == plain_reply(plain, loaded, inputs)


def test_the_picture_token_is_left_out_without_a_copy_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would wait for a GPU at every token."""
    logits_BV = torch.rand(2, 5)
    given_BV, expected_BV = logits_BV.clone(), logits_BV.clone()
    expected_BV[:, 3] = -torch.inf
    monkeypatch.setattr(torch, "tensor", None)
    inputs: Any = SimpleNamespace(token_id=3)
    assert torch.equal(PictureInputs.allowed(inputs, logits_BV), expected_BV)
    assert torch.equal(logits_BV, given_BV)


@family
def test_asking_about_a_picture(family: PictureFamily, folder_of: Folder, tmp_path: Path) -> None:
    folder, path = folder_of(family), tmp_path / "shape.png"
    loaded, example = load_model(str(folder)), load_demonstrations(rows()[:1])[0]
    example.images[0].decoded().save(path)
    plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
    expected = loaded.chat().decode(plain_reply(plain, loaded, by_processor(folder, example, in_parts(rows()[0]))))
    settings: dict[str, Any] = {"base": folder, "image": path, "max_completion_length": 12, "progress": False}
    answered = selfdistill.ask(folder, "What colour is it?", **settings)
    assert answered.reply == answered.base_reply == expected


@pytest.mark.parametrize(
    ("model", "base", "image", "problem"),
    [
        ("pictures", None, "none.png", "setting 'image': 'none.png' does not exist (looked in FOLDER)"),
        ("pictures", None, "cut.png", "setting 'image': 'FOLDER/cut.png' cannot be decoded (image file is truncated)"),
        ("pictures", None, "text.png", "setting 'image': 'FOLDER/text.png' is not a picture that Pillow reads;"),
        ("text", None, "whole.png", "model 'text' reads no pictures; use an image-text model with its processor's"),
        ("pictures", "text", "whole.png", "model 'text' reads no pictures; use an image-text model with its"),
    ],
)
def test_a_picture_that_cannot_be_asked_about_is_one_line(
    folder_of: Folder,
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    base: str | None,
    image: str,
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pictures").symlink_to(folder_of(FAMILIES[0]))
    Path("text").symlink_to(model_folder())
    draw_shape("red", "circle", (200, 200)).save("whole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:-300])
    Path("text.png").write_text("no picture")
    capsys.readouterr()  # what writing the models has printed
    assert main(["ask", model, "?", "--image", image, *([] if base is None else ["--base", base])]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading "))
    assert line.startswith(f"selfdistill: error: {problem.replace('FOLDER', str(tmp_path))}")


@family
def test_equal_token_ids_with_other_pictures_are_other_prompts(family: PictureFamily, folder_of: Folder) -> None:
    loaded = load_model(str(folder_of(family)))
    made = load_demonstrations(
        [
            {"prompt": "Which?", "completion": "a", "images": [draw_shape(colour, "square")]}
            for colour in ("red", "blue")
        ]
    )
    red, blue = (x.student_ids for x in encode(made, None, loaded.chat(), **LIMITS)[0])
    assert red == blue
    together = sample(loaded, [red, blue, red], Sampling(8, temperature=0.0))
    alone = [sample(loaded, [ids], Sampling(8, temperature=0.0))[0] for ids in (red, blue)]
    assert [x.ids for x in together] == [alone[0].ids, alone[1].ids, alone[0].ids]
    with torch.no_grad():
        output = ForwardPass(loaded)(loaded.model, [red, blue], [[65], [65]])
    assert not torch.allclose(*output.hidden_ND)


@family
def test_an_adapter_and_full_training_leave_the_vision_tower_alone(family: PictureFamily, folder_of: Folder) -> None:
    adapted, full = (load_model(str(folder_of(family))) for _ in range(2))
    add_lora(adapted, 2, None, 0)
    freeze_vision(adapted.model)
    freeze_vision(full.model)
    for model in (adapted.model, full.model):
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert names
        assert not any(map(is_vision, names))
    assert any(name.endswith("lm_head.weight") or "embed_tokens" in name for name in names)


def test_a_model_without_a_processor_refuses_pictures(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    with pytest.raises(
        UserError, match=r"^1 of 1 rows have pictures, which the model does not read \(data\[0\]\); use"
    ):
        encode(
            load_demonstrations(rows()[:1]),
            None,
            loaded.chat(),
            max_prompt_length=None,
            max_completion_length=16,
            window=None,
        )


@pytest.mark.parametrize("cause", ["damaged", "torchvision"])
def test_a_processor_that_cannot_be_loaded_is_one_line(folder_of: Folder, tmp_path: Path, cause: str) -> None:
    folder = shutil.copytree(folder_of(FAMILIES[0]), tmp_path / "model")
    file = folder / "processor_config.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text[:40] if cause == "damaged" else text.replace("LlavaProcessor", "Qwen2VLProcessor"))
    with pytest.raises(UserError) as error:
        load_model(str(folder))
    assert str(error.value).startswith(f"model {str(folder)!r}: its processor cannot be loaded (")
    assert "\n" not in str(error.value)
    if importlib.util.find_spec("torchvision") is None:
        assert str(error.value).endswith("; it may need torchvision, which is not installed")


def test_a_prompt_that_lost_its_pictures_is_refused(folder_of: Folder) -> None:
    loaded = load_model(str(folder_of(FAMILIES[0])))
    prompt = [*encoded(loaded)[0].student_ids, 65]
    with pytest.raises(UserError, match="do not work with this method"):
        sample(loaded, [prompt], Sampling(2, temperature=0.0))


@pytest.mark.parametrize("copies", [1, 9])
def test_a_context_that_lost_its_pictures_is_refused_though_its_beginning_is_kept_or_shared(
    folder_of: Folder, copies: int
) -> None:
    loaded = load_model(str(folder_of(FAMILIES[0])))
    contexts = [list(encoded(loaded)[0].student_ids)] * copies
    forward_pass = ForwardPass(loaded)
    kept = forward_pass.keep(contexts, 2**24) if copies == 1 else None
    with torch.no_grad(), pytest.raises(UserError, match="do not work with this method"):
        forward_pass(loaded.model, contexts, [[65]] * copies, kept)


def test_rows_whose_pictures_the_processor_rejects_are_named(folder_of: Folder, tmp_path: Path) -> None:
    loaded = load_model(str(folder_of(FAMILIES[0])))
    assert loaded.pictures is not None
    processor = loaded.pictures.processor

    def strict(images: list[Image.Image], **options: Any) -> Any:
        if images[0].height > 200 * images[0].width:
            raise ValueError("absolute aspect ratio must be\nsmaller than 200")
        return processor(images=images, **options)

    loaded.pictures.processor = strict
    narrow, path = Image.new("RGB", (1, 300)), tmp_path / "a.png"
    narrow.save(path)
    raw = [*rows(), rows()[1] | {"images": [rows()[0]["images"][0], narrow]}, rows()[0] | {"images": [str(path)]}]
    why = "absolute aspect ratio must be smaller than 200"
    with pytest.raises(UserError) as error:
        encode(
            load_demonstrations(raw), None, loaded.chat(), max_prompt_length=None, max_completion_length=9, window=None
        )
    name = f"model {loaded.name!r}: its processor rejects picture"
    assert str(error.value) == (
        f"2 of 5 rows have pictures that the model does not read: data[3]: {name} 2: {why}; "
        f"data[4]: {name} 1 ({path}): {why}"
    )


def test_a_processor_that_does_not_say_what_it_writes_for_a_picture_is_refused(folder_of: Folder) -> None:
    loaded = load_model(str(folder_of(FAMILIES[0])))
    assert loaded.pictures is not None
    processor = loaded.pictures.processor

    class SilentProcessor:
        def __call__(self, **options: Any) -> Any:
            made = processor(**options)
            return {name: value for name, value in made.items() if name != "text_replacement_offsets"}

    loaded.pictures.processor = SilentProcessor()
    with pytest.raises(UserError) as error:
        encode(
            load_demonstrations(rows()),
            None,
            loaded.chat(),
            max_prompt_length=None,
            max_completion_length=9,
            window=None,
        )
    assert str(error.value) == (
        f"model {loaded.name!r}: SilentProcessor does not say what it writes for a picture; use another model, or a "
        "newer transformers"
    )


def test_a_picture_is_decoded_again_from_its_file(folder_of: Folder, tmp_path: Path) -> None:
    loaded, path = load_model(str(folder_of(FAMILIES[0]))), tmp_path / "a.png"
    draw_shape("red", "circle").save(path)
    made = load_demonstrations([{"prompt": "a", "completion": "b", "images": [str(path)]}])
    assert made[0].images[0].data is None
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(UserError, match=r"a\.png: cannot be read again \(its bytes have changed\); restore it"):
        loaded.chat().encode_prompt(made[0].prompt, None, {made[0].images[0].digest: made[0].images[0]})
