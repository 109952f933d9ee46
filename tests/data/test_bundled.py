"""The bundled anchors: of which kinds they are, and that none is near what is measured or taught."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from selfdistill.data import Demonstration, load_demonstrations, packaged
from selfdistill.data.bundled import anchor_kinds, anchor_prompts, drift_prompts
from selfdistill.model.starter import starter_model_path

ANCHORS = Path(packaged("anchors.jsonl"))
LEAST = {
    **dict.fromkeys(("question", "instruction"), 70),
    **dict.fromkeys(("smalltalk", "list", "code", "arithmetic", "language"), 35),
    "fact": 100,
    "reading": 50,
    "example": 40,
}
"""How many anchors of each kind there are at least."""


@pytest.fixture(scope="module")
def anchors() -> list[Demonstration]:
    return load_demonstrations(ANCHORS)


@pytest.fixture(scope="module")
def others() -> dict[str, list[Demonstration]]:
    """All other bundled rows that are measured or taught, by the file's path in the folder."""
    paths = {path.relative_to(ANCHORS.parent).as_posix(): path for path in ANCHORS.parent.rglob("*.jsonl")}
    del paths[ANCHORS.name]
    return {"general.txt": drift_prompts(), **{name: load_demonstrations(path) for name, path in paths.items()}}


# --- what they hold ---


def test_anchors_have_many_kinds_and_no_answers(anchors: list[Demonstration]) -> None:
    rows = [json.loads(line) for line in ANCHORS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(anchors) >= 520
    assert all(row.keys() == {"prompt", "kind"} for row in rows)
    kinds = Counter(row["kind"] for row in rows)
    assert kinds.keys() == LEAST.keys()
    assert not {kind: kinds[kind] for kind, least in LEAST.items() if kinds[kind] < least}


def test_anchors_of_some_kinds_are_those_of_the_file(anchors: list[Demonstration]) -> None:
    kinds = [json.loads(line)["kind"] for line in ANCHORS.read_text(encoding="utf-8").splitlines()]
    assert set(anchor_kinds("package")) == set(kinds)
    assert [row.prompt for row in anchor_prompts()] == [row.prompt for row in anchors]
    some = [row.prompt for row, kind in zip(anchors, kinds, strict=True) if kind in ("list", "code")]
    for source in ("package:list+code", "package:code+list"):
        assert [row.prompt for row in anchor_prompts(source)] == some


def test_some_anchors_have_system_and_earlier_turns(anchors: list[Demonstration]) -> None:
    roles = [tuple(turn["role"] for turn in row.prompt) for row in anchors]
    assert sum(turns[0] == "system" for turns in roles) >= 30
    assert sum("assistant" in turns for turns in roles) >= 30
    for turns in roles:
        chat = turns[1:] if turns[0] == "system" else turns
        assert chat == ("user", "assistant") * (len(chat) // 2) + ("user",)


def test_anchors_are_short(anchors: list[Demonstration]) -> None:
    assert max(sum(len(turn["content"]) for turn in row.prompt) for row in anchors) < 900


@pytest.mark.slow
def test_anchors_fit_256_tokens_of_the_starter_model(anchors: list[Demonstration]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(starter_model_path("smollm2-135m"))
    rendered = [
        tokenizer.apply_chat_template(list(row.prompt), add_generation_prompt=True, tokenize=False) for row in anchors
    ]
    assert 20 < max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in rendered) <= 256


# --- how far they are from the others ---


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[+*/=]", re.sub("['\u2019]", "", text.lower()))


OPENINGS = frozenset(
    words("""
    a an the this that these those some any each every all both one it its i me my you your we us our he she they them
    his her their who whom whose what whats which when where why how many much is are was were be been am do does did
    can could will would shall should may might must have has had and or but if so not no of in on at to for from by
    with as about into between there here please than then
    write name give list explain describe summarize summarise translate read text question answer following word words
    sentence difference python function returns return
    """)
)
"""Words that two prompts may share and still be about different things: function words, and what tasks open with."""


def content(text: str) -> frozenset[str]:
    """The words that are not openings, without a plural's ``s``."""
    return frozenset(word.rstrip("s") for word in words(text) if word not in OPENINGS)


def texts(row: Demonstration) -> list[str]:
    return [*(turn["content"] for turn in row.prompt), *([row.document] if row.document else [])]


def sentences(row: Demonstration) -> list[str]:
    return [part for text in texts(row) for part in re.split(r"[.!?](?=\s|$)|\n", text)]


def runs(row: Demonstration) -> set[tuple[str, ...]]:
    """Runs of four words of which at least two are not openings."""
    parts = [words(text) for text in texts(row)]
    found = {tuple(part[i : i + 4]) for part in parts for i in range(len(part) - 3)}
    return {run for run in found if sum(word not in OPENINGS for word in run) > 1}


def shared_runs(anchors: list[Demonstration], rows: list[Demonstration]) -> Iterator[str]:
    of_rows = {run: row for row in rows for run in runs(row)}
    for anchor in anchors:
        for run in runs(anchor) & of_rows.keys():
            yield f"{anchor.source}: {' '.join(run)!r} is in {of_rows[run].source}, too"


def asked_again(anchors: list[Demonstration], questions: list[Demonstration]) -> Iterator[str]:
    """Anchors of which one sentence has all the content words of a question."""
    said = [(anchor, content(sentence)) for anchor in anchors for sentence in sentences(anchor)]
    for question in questions:
        asked = content(" ".join(texts(question)))
        for anchor, has in said:
            if asked and asked <= has:
                yield f"{anchor.source} asks {' '.join(sorted(asked))!r} like {question.source}"


def of(*prompts: str) -> list[Demonstration]:
    return [Demonstration(prompt, source=prompt) for prompt in prompts]  # type: ignore[arg-type]


def test_the_rules_find_what_is_near() -> None:
    questions = of("What is the plural of mouse?", "How many legs does a spider have?", "What is 2 plus 3?")
    near = of("Is 'mouse' a plural?", "Six spiders have how many legs?", "Hi. Is 3 plus 2 five?")
    assert len([*asked_again(near, questions)]) == 3
    assert not [*shared_runs(near, questions)]
    assert len([*shared_runs(of("I know the plural of mouse, I think."), questions)]) == 1
    far = of("What is the plural of ox?", "2 mice. 3 plus", "How many legs does a chair have?")
    assert not [*asked_again(far, questions), *shared_runs(far, questions)]


def test_anchors_share_no_run_of_words_with_what_is_measured_or_taught(
    anchors: list[Demonstration], others: dict[str, list[Demonstration]]
) -> None:
    assert {"general.txt", "routing.test.jsonl", "tools.train.jsonl", "knowledge.test.jsonl"} <= others.keys()
    assert [*shared_runs(anchors, [row for rows in others.values() for row in rows])] == []


def test_anchors_ask_no_question_that_measures_prior_abilities_or_distance(
    anchors: list[Demonstration], others: dict[str, list[Demonstration]]
) -> None:
    questions = [row for name, rows in others.items() if name.startswith(("prior", "general")) for row in rows]
    assert len(questions) >= 24 + 40 + 90
    assert [*asked_again(anchors, questions)] == []


def test_no_two_anchors_say_the_same(anchors: list[Demonstration]) -> None:
    bags = [content(" ".join(texts(row))) for row in anchors]
    alike = [
        f"{row.source} and {other.source}"
        for i, row in enumerate(anchors)
        for j, other in enumerate(anchors[:i])
        if len(bags[i] & bags[j]) >= 0.6 * len(bags[i] | bags[j])
    ]
    assert alike == []
