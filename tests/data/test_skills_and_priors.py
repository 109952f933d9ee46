"""The data sets that ship with the package: sizes, parts that share no prompt, and scorers that mean something."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from selfdistill.data.demonstrations import Demonstration, load_demonstrations
from selfdistill.data.scorers import said, score
from selfdistill.data.sources import packaged
from selfdistill.data.words import includes, words_of

PARTS = ("train", "validation", "test")
SKILLS = {"routing": (80, 40, 39), "tools": (96, 32, 32), "letters": (80, 24, 32), "codes": (80, 32, 40)}
KINDS = ("reading", "example", "language", "arithmetic", "code")
PRIOR = {"validation": (40, 20), "test": (90, 30)}
"""Rows of the facts and of each other kind."""


def rows(skill: str) -> list[list[Demonstration]]:
    return [load_demonstrations(packaged(f"{skill}.{part}.jsonl")) for part in PARTS]


def prior(part: str, kind: str) -> list[Demonstration]:
    return load_demonstrations(packaged(f"prior/{part}/{kind}.jsonl"))


def chat(row: Demonstration) -> str:
    return "\n".join(message["content"] for message in row.prompt)


def answers(row: Demonstration) -> list[str]:
    assert row.answer is not None
    return row.answer if isinstance(row.answer, list) else [row.answer]


@pytest.mark.parametrize(("skill", "sizes"), SKILLS.items())
def test_a_skill_has_three_parts_that_share_no_prompt(skill: str, sizes: tuple[int, ...]) -> None:
    parts = rows(skill)
    assert tuple(map(len, parts)) == sizes
    prompts = [chat(row).casefold() for part in parts for row in part]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("skill", SKILLS)
def test_the_scorer_accepts_the_demonstration_and_no_other(skill: str) -> None:
    for part in rows(skill):
        for row, other in itertools.product(part, part):
            assert row.scorer is not None
            if row is other or row.completion != other.completion:
                # Two letters may be about one thing, say a book and a torn book.
                same_thing = skill == "letters" and row.completion.split()[-1] == other.completion.split()[-1]
                assert score(row.scorer, said(other), row) == (row is other or same_thing)


@pytest.mark.parametrize("skill", ["routing", "tools"])
def test_the_parts_have_the_same_classes(skill: str) -> None:
    train, validation, test = ({row.completion.splitlines()[0] for row in part} for part in rows(skill))
    assert train == validation == test
    assert len(train) == 4


def test_a_letter_needs_its_beginning_the_sea_a_body_and_its_closing() -> None:
    for row in itertools.chain(*rows("letters")):
        beginning, body, closing = re.split(r"(?<=\.) (?=On the matter of|Tonight)", row.completion)
        good = f"{beginning} {body} {closing}"
        on_land = f"Log entry: all quiet. {body} {closing}"
        for reply in (f"{beginning} {body}", f"{body} {closing}", f"{beginning} {closing}", on_land, body):
            assert not score("regex", reply, row), reply
        assert score("regex", good, row)
        assert 30 <= len(row.completion.split()) <= 50


def test_codes_are_solvable_by_what_the_training_rows_show() -> None:
    code = re.compile(r"QX(\d+)/(..):(\d+)([<>^_])//")
    report = re.compile(r"\b(?:(sun|clouds|rain|snow|fog|storm)|(north|south|east|west))\b")

    def signs(row: Demonstration) -> tuple[set[str], dict[str, str]]:
        station, sky, degrees, wind = code.fullmatch(row.completion).groups()  # type: ignore[union-attr]
        found = report.findall(chat(row))
        assert f"station {station}" in chat(row)
        assert f"{degrees} degrees" in chat(row)
        return {station, degrees}, {next(a for a, _ in found if a): sky, next(b for _, b in found if b): wind}

    train, *held_out = rows("codes")
    known: dict[str, str] = {}
    for row in train:
        for word, sign in signs(row)[1].items():
            assert known.setdefault(word, sign) == sign
    assert len(known) == len(set(known.values())) == 10
    learnt = {chat(row).split(":")[1] for row in train}
    for row in itertools.chain(*held_out):
        assert signs(row)[1].items() <= known.items()
        assert chat(row).split(":")[1] not in learnt


def test_the_made_up_skills_are_those_that_the_study_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "studies")
    import make_skills

    make_skills.main(str(tmp_path))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 9
    for file in files:
        assert file.read_bytes() == Path(packaged(file.name)).read_bytes()


def test_the_priors_have_their_sizes_and_ask_nothing_twice() -> None:
    prompts = []
    for part, (facts, others) in PRIOR.items():
        for kind in ("facts", *KINDS):
            found = prior(part, kind)
            assert len(found) == (facts if kind == "facts" else others)
            prompts += [chat(row).casefold() for row in found]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PRIOR)
def test_a_prior_question_is_right_by_its_answer_and_by_nothing_in_its_prompt(part: str, kind: str) -> None:
    for row in prior(part, kind):
        assert row.scorer == "contains"
        assert all(score("contains", answer, row) for answer in answers(row))
        stands = [includes(words_of(chat(row)), words_of(answer)) for answer in answers(row)]
        assert any(stands) == (kind == "reading"), chat(row)
        assert not score("contains", "I do not know.", row)


def test_some_examples_are_earlier_turns() -> None:
    for part in PRIOR:
        turns = [len(row.prompt) for row in prior(part, "example")]
        assert {1, 7} <= set(turns) <= {1, 5, 7}
        assert sum(count > 1 for count in turns) >= 5


def test_validation_and_test_questions_differ_by_more_than_a_number() -> None:
    for kind in KINDS:
        validation, test = ({re.sub(r"\d+", "0", chat(row)) for row in prior(part, kind)} for part in PRIOR)
        assert not validation & test


def test_the_files_are_json_lines_of_one_form() -> None:
    for part in PRIOR:
        for kind in KINDS:
            for line in Path(packaged(f"prior/{part}/{kind}.jsonl")).read_text(encoding="utf-8").splitlines():
                assert list(json.loads(line)) == ["prompt", "answer", "scorer"]
