"""Chat templates of real families: end token, demonstration, system turn, thoughts, control tokens and the date.

What a user means by their rows is what student and teacher read, or one error names the rows and the reason.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest
from conftest import final_weights, same
from families import FAMILIES, Family

import selfdistill as sd
from selfdistill.data import ChatFormat, Demonstration, Example, encode, load_demonstrations, parse_context
from selfdistill.data.chat_format import thought_and_said
from selfdistill.model import LoadedModel, load_model

BY_NAME = {family.name: family for family in FAMILIES}
BARE = [family.as_base for family in FAMILIES if family.bare]
THINKING = [variant for family in FAMILIES if family.thinks for variant in (family, family.with_special_tags)]
THOUGHT = "<think>\nCapitals: Rome, not Turin.\n</think>\n\nRome."
REPLIES = (
    "Paris.",
    "  1. one\n  2. two\n\n",
    "def f(x):\n    return {{ x }}  # {% raw %}",
    "\n\nThe token <|im_end|>, or <end_of_turn>, or </s>, is a name.",
    "[INST] 25% of 10² is 2.5: naïve.",
)
LAYOUTS = ("turns", "turns:repeats=2", "example", "few_shot:k=3,this=true", "document", "document:repeats=2")
LONG = {"max_prompt_length": None, "max_completion_length": 256, "window": None}


def of(family: Family) -> str:
    return family.name + (" as base" if family.eos == family.bare != "" and family.ends == (family.bare,) else "")


def tags_of(family: Family) -> str:
    return f"{family.name} {'special' if '<think>' in family.special else 'added'} tags"


each_family = pytest.mark.parametrize("family", FAMILIES, ids=of)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    """The folder of a family's tiny model."""
    made: dict[Family, Path] = {}

    def folder_of(family: Family) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family.name)
            family.write(made[family])
        return made[family]

    return folder_of


@pytest.fixture(scope="module")
def load(folder: Callable[[Family], Path]) -> Callable[[Family], LoadedModel]:
    loaded: dict[Family, LoadedModel] = {}

    def load_family(family: Family) -> LoadedModel:
        if family not in loaded:
            loaded[family] = load_model(str(folder(family)))
        return loaded[family]

    return load_family


@pytest.fixture
def day() -> Iterator[Callable[[int], None]]:
    """Sets the clock of this process to one of two days, 26 hours apart, whatever the hour: by the time zone."""
    with pytest.MonkeyPatch.context() as patch:

        def set_day(number: int) -> None:
            patch.setenv("TZ", ("Etc/GMT+12", "Pacific/Kiritimati")[number])
            time.tzset()

        yield set_day
    time.tzset()


def chat_of(loaded: LoadedModel, **options: Any) -> ChatFormat:
    return ChatFormat(loaded.tokenizer, loaded.end_token_ids, options)


def demonstrations(replies: tuple[str, ...], **more: Any) -> list[Demonstration]:
    return [
        Demonstration(f"Question {i}?", reply, document=f"Document {i}.", row=i, source=f"rows.jsonl:{i + 1}", **more)
        for i, reply in enumerate(replies)
    ]


def encoded(rows: list[Demonstration], layout: str | None, chat: ChatFormat) -> list[Example]:
    return encode(rows, parse_context(layout) if layout else None, chat, **LONG)[0]


def text_of(loaded: LoadedModel, ids: list[int]) -> str:
    return str(loaded.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def control(loaded: LoadedModel, ids: list[int]) -> list[int]:
    """Those of the ids that are control tokens."""
    return [token for token in ids if token in loaded.tokenizer.added_tokens_decoder]


# --- prompts and completions are those of the template ---


@each_family
def test_ordinary_texts_are_encoded_as_the_template_has_them(family: Family, load: Callable[..., LoadedModel]) -> None:
    loaded = load(family)
    asked = [{"role": "user", "content": "Hello?"}]
    chats = [asked, [*asked, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Bye?"}]]
    if family.system != "left out":
        chats += [[{"role": "system", "content": "Be brief."}, *chat] for chat in chats]
    for messages in chats:
        expected = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        expected_ids = loaded.tokenizer(expected, add_special_tokens=False)["input_ids"]
        assert chat_of(loaded).encode_prompt(messages) == expected_ids
        if family.bos is not None:
            assert expected_ids.count(loaded.tokenizer.bos_token_id) == expected.count(family.bos)


@each_family
def test_a_completion_is_what_the_template_writes_after_the_prompt(
    family: Family, load: Callable[..., LoadedModel]
) -> None:
    loaded = load(family)
    chat, asked = chat_of(loaded), [{"role": "user", "content": "Hello?"}]
    whole = loaded.tokenizer.apply_chat_template(
        [*asked, {"role": "assistant", "content": "Hi."}], tokenize=False, add_generation_prompt=False
    )
    found = text_of(loaded, chat.encode_prompt(asked) + chat.encode_completion("Hi."))
    if family.opens:  # the template would write no thought at all; the prompt has begun one
        assert re.fullmatch(r"(?s).*<think>\s*</think>\s*Hi\.", found.removesuffix(family.end))
    else:
        ids = loaded.tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert text_of(loaded, ids).startswith(found)


# --- the end token ---


@pytest.mark.parametrize("family", [*FAMILIES, *BARE], ids=of)
def test_the_token_that_the_template_writes_after_a_reply_ends_replies(
    family: Family, load: Callable[..., LoadedModel]
) -> None:
    loaded = load(family)
    end = loaded.tokenizer.convert_tokens_to_ids(family.end)
    chat = chat_of(loaded)
    assert end in loaded.end_token_ids
    assert set(loaded.tokenizer.convert_tokens_to_ids(list(family.end_tokens))) <= set(loaded.end_token_ids)
    assert end in loaded.model.generation_config.eos_token_id
    assert chat.end_token_id == end
    for reply in (*REPLIES, THOUGHT):
        ids = chat.encode_completion(reply)
        assert ids[-1] == end
        assert ids.count(end) == 1


@pytest.mark.parametrize("family", [next((b for b in BARE if b.name == f.name), f) for f in FAMILIES], ids=of)
def test_a_model_learns_its_replies_and_ends_them(
    family: Family, folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine-tuning, sampling, evaluation and the exported model agree on where a reply ends and on what it says."""
    monkeypatch.chdir(tmp_path)
    replies = ["<think>\nx\n</think>\n\nab", "<think>\ny\n</think>\n\nba"] if family.thinks else ["ab", "ba"]
    rows = [{"prompt": name, "completion": reply} for name, reply in zip("pq", replies, strict=True)]
    run = sd.train(
        str(folder(family)),
        rows,
        output_dir="run",
        method="sft",
        batch_size=2,
        max_steps=60,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=0,
        view_rows=0,
        drift_steps=0,
        max_completion_length=32,
        mixed_precision="no",
        progress=False,
    )
    found = sd.evaluate(str(run.final), rows, max_completion_length=32, progress=False)
    assert found.accuracy == 1
    assert found.details["completion/truncated"] == 0
    exported = sd.export(run, output_dir="exported", progress=False)
    for saved in (run.final, exported):
        ends = json.loads((saved / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
        assert family.tokenizer().convert_tokens_to_ids(family.end) in (ends if isinstance(ends, list) else [ends])


# --- the demonstration ---


@each_family
def test_a_reply_is_trained_as_it_is(family: Family, load: Callable[..., LoadedModel]) -> None:
    """Prompt and completion together are the template's text around the demonstration itself."""
    loaded = load(family)
    for example in encoded(demonstrations((*REPLIES, "x", " ")), None, chat_of(loaded)):
        reply = example.demonstration.completion
        trained = text_of(loaded, example.completion_ids)
        assert reply in trained
        # Around it the template may write a space, an empty thought and the end of the turn.
        assert re.sub(r"<think>|</think>|\s", "", trained.replace(reply, "", 1)) == family.end


@pytest.mark.parametrize("layout", LAYOUTS)
@each_family
def test_the_teacher_reads_the_demonstrations_as_they_are(
    family: Family, layout: str, load: Callable[..., LoadedModel]
) -> None:
    loaded = load(family)
    rows = demonstrations((*REPLIES, *((THOUGHT, "<think>\n\n</think>\n\nLyon.") if family.thinks else ())))
    examples = encoded(rows, layout, chat_of(loaded))
    for row, example in zip(rows, examples, strict=True):
        read = text_of(loaded, example.teacher_ids or [])
        assert read.count(row.completion) == (2 if "repeats=2" in layout else 1), (row.completion, read)
        shown = [other for other in rows if other.completion in read]
        assert len(shown) == (4 if layout.startswith("few_shot") else 1)
        assert ("Document" in read) == layout.startswith("document")
        seen = text_of(loaded, example.student_ids)
        assert read.endswith(seen[seen.rindex("?") + 1 :])  # both are about to reply


@each_family
def test_teacher_and_student_read_the_same_prompt_but_for_the_context(
    family: Family, load: Callable[..., LoadedModel]
) -> None:
    loaded = load(family)
    (row, *_) = demonstrations(("Paris.",) * 4)
    asked = [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "One."}, *row.prompt]
    chats = [row.prompt, tuple(asked)]
    if family.system != "left out":
        chats += [({"role": "system", "content": "Be brief."}, *chat) for chat in chats]
    for prompt in chats:
        (example,) = encoded([Demonstration(prompt, "Paris.")], "turns", chat_of(loaded))
        read, seen = (text_of(loaded, ids or []) for ids in (example.teacher_ids, example.student_ids))
        for message in prompt:
            times = 2 if message is prompt[-1] else 1  # turns before the question come once
            assert read.count(message["content"]) == times * seen.count(message["content"])
            assert seen.count(message["content"]) == 1


# --- the system turn ---


@pytest.mark.parametrize("layout", ["turns", "example", "document"])
@each_family
def test_a_system_turn_is_kept_merged_or_refused_by_file_and_line(
    family: Family, layout: str, load: Callable[..., LoadedModel], write_rows: Callable[..., Path]
) -> None:
    loaded = load(family)
    system = {"role": "system", "content": "Speak like a pirate."}
    file = write_rows(
        [
            {"prompt": [system, {"role": "user", "content": f"Question {i}?"}], "completion": "Ah.", "document": "Sea."}
            for i in range(3)
        ]
    )
    rows = load_demonstrations(str(file))
    if family.system == "left out":
        with pytest.raises(sd.UserError, match="template") as refusal:
            encoded(rows, layout, chat_of(loaded))
        assert f"{file.name}:1, 2, 3: " in str(refusal.value)
        assert "system" in str(refusal.value)
        assert "\n" not in str(refusal.value)
        return
    for example in encoded(rows, layout, chat_of(loaded)):
        for ids in (example.student_ids, example.teacher_ids):
            read = text_of(loaded, ids or [])
            assert read.count("Speak like a pirate.") == 1
            before = read[: read.index("Speak like a pirate.")]
            assert ("Question" in before or "Sea." in before) == (
                family.system == "merged into the last user turn" and ids is example.teacher_ids and layout != "example"
            )
        assert "of this family" not in text_of(loaded, example.student_ids)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.alternates], ids=of)
def test_turns_that_a_template_refuses_are_named_by_file_and_line(
    family: Family, folder: Callable[..., Path], load: Callable[..., LoadedModel], write_rows: Callable[..., Path]
) -> None:
    user = {"role": "user", "content": "Hello?"}
    file = write_rows([{"prompt": [user] * (1 + i % 2), "completion": "Hi."} for i in range(6)], name="turns.jsonl")
    calls: list[Callable[[], Any]] = [
        lambda: encoded(load_demonstrations(str(file)), "turns", chat_of(load(family))),
        lambda: sd.train(str(folder(family)), str(file), output_dir=str(file.parent / "run"), context="turns"),
        lambda: sd.evaluate(str(folder(family)), str(file)),
        lambda: sd.check(str(folder(family)), str(file)),
    ]
    for call in calls:
        with pytest.raises(sd.UserError, match=r"turns\.jsonl:2, 4, 6: ") as refusal:
            call()
        assert "turns" in str(refusal.value)
        assert "take turns" in str(refusal.value) or "alternate" in str(refusal.value)  # the template's own words
        assert "\n" not in str(refusal.value)
        assert not re.search(r"turns\.jsonl:[135]\b", str(refusal.value))


# --- thoughts ---


@pytest.mark.parametrize("family", THINKING, ids=tags_of)
def test_a_demonstrated_thought_is_trained_as_thought(family: Family, load: Callable[..., LoadedModel]) -> None:
    loaded = load(family)
    chat = chat_of(loaded)
    begin, end = loaded.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    prompt = chat.encode_prompt([{"role": "user", "content": "Capital?"}])
    for reply, thought in ((THOUGHT, "Capitals: Rome, not Turin."), ("Rome.", "")):
        completion = chat.encode_completion(reply)
        both = prompt + completion
        found, said = thought_and_said(chat, prompt, completion)
        assert (found.strip(), said.strip()) == (thought, "Rome.")
        assert both.count(begin) == both.count(end) <= 1
        assert both.count(end) == 1 or not thought
        assert text_of(loaded, both).count("think>") == 2 * both.count(end)  # none spelled in letters
        if thought:
            assert THOUGHT in text_of(loaded, both)


@pytest.mark.parametrize("layout", ["turns", "turns:repeats=2", "few_shot:k=1,this=true", "document"])
@pytest.mark.parametrize("family", THINKING, ids=tags_of)
def test_a_demonstrated_thought_is_shown_as_thought(
    family: Family, layout: str, load: Callable[..., LoadedModel]
) -> None:
    loaded = load(family)
    chat = chat_of(loaded)
    tags = loaded.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    for example in encoded(demonstrations((THOUGHT, THOUGHT.replace("Turin", "Nice"))), layout, chat):
        shown = 1 if layout in ("turns", "document") else 2
        for tag in tags:
            assert (example.teacher_ids or []).count(tag) == shown + example.student_ids.count(tag)


@pytest.mark.parametrize("family", THINKING, ids=tags_of)
def test_a_thought_in_a_users_text_is_text(family: Family, load: Callable[..., LoadedModel]) -> None:
    loaded = load(family)
    chat = chat_of(loaded)
    rows = [Demonstration(f"What is {THOUGHT}?", THOUGHT, document=f"{THOUGHT}{THOUGHT}")]
    (bare,) = encoded([Demonstration("What?", "x")], None, chat)
    (example,) = encoded(rows, "example", chat)
    assert control(loaded, example.teacher_ids or []) == control(loaded, bare.student_ids)
    assert control(loaded, example.student_ids) == control(loaded, bare.student_ids)
    assert text_of(loaded, example.teacher_ids or []).count(THOUGHT) == 2
    (example,) = encoded(rows, "document:show=document", chat)
    assert text_of(loaded, example.teacher_ids or []).count(THOUGHT) == 3


def test_thinking_that_is_switched_off_is_off_on_both_sides(load: Callable[..., LoadedModel]) -> None:
    loaded = load(BY_NAME["qwen3"])
    chat = chat_of(loaded, enable_thinking=False)
    begin, end = loaded.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    (example,) = encoded(demonstrations(("Paris.",)), "turns", chat)
    for ids in (example.student_ids, example.teacher_ids or []):
        assert text_of(loaded, ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert ids.count(begin) == ids.count(end) == 1
    assert text_of(loaded, example.completion_ids) == "Paris.<|im_end|>"
    assert "<|im_start|>assistant\nParis.<|im_end|>" in text_of(loaded, example.teacher_ids or [])


# --- names of control tokens in texts ---


@each_family
def test_names_of_control_tokens_in_texts_stay_text(family: Family, load: Callable[..., LoadedModel]) -> None:
    loaded = load(family)
    names = [str(token) for token in loaded.tokenizer.added_tokens_decoder.values()]
    text, written = (
        "".join(f" a{name} b{name}{name}\n" for name in some)
        for some in (names, [name for name in names if not re.search("think|tool", name)])  # those a reply may contain
    )
    chat = chat_of(loaded)

    def row(words: str, said: str) -> Demonstration:
        earlier = ({"role": "user", "content": f"1{words}1"}, {"role": "assistant", "content": "Hm."})
        return Demonstration(
            (*earlier, {"role": "user", "content": f"2{words}2"}),
            f"3{said}3",
            document=f"4{words}4",
        )

    plain, named = (encoded([row(*words)], "document", chat)[0] for words in ((" ", " "), (text, written)))
    for found, expected in ((named.student_ids, plain.student_ids), (named.teacher_ids, plain.teacher_ids)):
        assert control(loaded, found or []) == control(loaded, expected or [])
    assert control(loaded, named.completion_ids) == control(loaded, plain.completion_ids)
    for number, ids in (("1", named.student_ids), ("2", named.student_ids), ("4", named.teacher_ids)):
        assert f"{number}{text}{number}" in text_of(loaded, ids or [])
    for ids in (named.completion_ids, named.teacher_ids):
        assert f"3{written}3" in text_of(loaded, ids or [])
    assert control(loaded, chat.encode_text(text)) == []
    assert text_of(loaded, chat.encode_text(text)) == text


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.plain_markers], ids=of)
def test_a_turn_that_a_user_writes_out_is_not_a_turn(family: Family, load: Callable[..., LoadedModel]) -> None:
    loaded = load(family)
    chat = chat_of(loaded)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    forged = chat.render(turns)
    ids = chat.encode_prompt([{"role": "user", "content": f"x{forged}x"}])
    assert control(loaded, ids) == control(loaded, chat.encode_prompt([{"role": "user", "content": "x"}]))
    assert f"x{forged}x" in text_of(loaded, ids)


# --- the date ---


def test_templates_that_read_the_clock_are_known() -> None:
    assert [family.name for family in FAMILIES if family.dated] == [
        family.name for family in FAMILIES if "strftime_now" in family.template
    ]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.dated or f.name == "qwen3"], ids=of)
def test_a_run_goes_on_the_next_day(
    family: Family,
    folder: Callable[..., Path],
    day: Callable[[int], None],
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """A stopped run reads on another day what it has read so far, and ends as it would have on its own day."""
    file = write_rows([{"prompt": f"q{i}", "completion": "ab"} for i in range(4)])
    settings: dict[str, Any] = {
        "context": "turns",
        "max_completion_length": 8,
        "batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "save_steps": 1,
        "mixed_precision": "no",
        "progress": False,
    }
    day(0)
    whole = sd.train(str(folder(family)), str(file), output_dir=str(tmp_path / "whole"), **settings)
    stopped = str(tmp_path / "stopped")
    sd.train(str(folder(family)), str(file), output_dir=stopped, on_step=lambda step, *_: step == 1, **settings)
    day(1)
    run = sd.train(output_dir=stopped, resume=True, progress=False)
    assert len(run.metrics) == 3
    assert same(final_weights(run.config), final_weights(whole.config))
    if family.dated:  # the days do differ
        other = sd.train(str(folder(family)), str(file), output_dir=str(tmp_path / "other"), **settings)
        assert not same(final_weights(other.config), final_weights(whole.config))


# --- what the documentation says ---


def test_the_page_has_the_table_of_families() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "templates.md").read_text(encoding="utf-8")
    assert families.table() in page, "run: python tests/families.py"


def test_each_template_belongs_to_a_family_that_does_what_the_table_says() -> None:
    assert sorted(file.stem for file in families.TEMPLATES.glob("*.jinja")) == sorted(BY_NAME)
    for family in FAMILIES:
        tokenizer = family.tokenizer()
        reply = THOUGHT.replace("Rome.", " Rome. ")
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": reply}]
        read = tokenizer.apply_chat_template([*turns, turns[0]], tokenize=False, add_generation_prompt=True)
        changes = "nothing" if reply in read else "drops their thoughts" if "Capitals" not in read else families.TRIMS
        assert changes == family.changes
        assert read.endswith(family.opens)
        asked = tokenizer.apply_chat_template([{"role": "user", "content": "@"}], tokenize=False)
        assert ("system" in asked[: asked.index("@")]) == family.own_system
        if family.system != "left out":
            system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "@"}]
            read = tokenizer.apply_chat_template(system, tokenize=False)
            between = read[read.index("Be brief.") + len("Be brief.") : read.index("@")]
            assert family.system.startswith("merged" if not between.strip() else "kept")
        # Markers in plain text are those that the page warns of.
        assert ("<|user|>" in asked and "<|user|>" not in tokenizer.get_vocab()) == (family.name == "olmo2")
