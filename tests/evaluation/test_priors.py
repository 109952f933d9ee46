"""Prior abilities: rows in, accuracies against straightforward recomputation, or one exact message out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from selfdistill.data.chat_format import ChatFormat
from selfdistill.data.demonstrations import load_demonstrations
from selfdistill.data.sources import packaged
from selfdistill.errors import UserError
from selfdistill.evaluation.priors import Choices, PriorResult, encode_priors, load_prior, prior_abilities
from selfdistill.model.forward import ForwardPass
from selfdistill.model.loading import LoadedModel
from selfdistill.model.sampling import Sampling, sample
from selfdistill.runtime import progress_shown

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

CHOICES = [
    {"query": "Question: What floats?", "choices": ["wood", "a stone of lead"], "gold": 0},
    {"query": "He opened the door, because", "choices": ["it rang.", "he was asleep in bed."], "gold": 1},
    {"query": "Kill flies.\n", "choices": ["Swat them.", "Sing to them softly."], "gold": 0},
]
WINOGRANDE = [{"query": None, "contexts": ["Ann has the", "Bob owns the"], "continuation": "red car", "gold": 1}]
LAMBADA = [{"context": "once upon a", "continuation": "time"}]


def chat_of(loaded: LoadedModel) -> ChatFormat:
    return ChatFormat(loaded.tokenizer, loaded.end_token_ids, {})


def abilities(loaded: LoadedModel, path: str) -> list[PriorResult]:
    chat = chat_of(loaded)
    return prior_abilities(
        loaded, ForwardPass(loaded), chat, encode_priors(loaded, chat, load_prior(path)), batch_size=4, who="model"
    )


def correct(loaded: LoadedModel, rows: list[Choices]) -> list[bool]:
    chat = chat_of(loaded)
    encoded = encode_priors(loaded, chat, {"x": rows})
    (result,) = prior_abilities(loaded, ForwardPass(loaded), chat, encoded, batch_size=16, who="model")
    return result.correct


def reference_loglikelihood(loaded: LoadedModel, context: str, continuation: str) -> tuple[float, bool]:
    """One row, one forward pass, float64, a loop over positions."""
    context_ids = loaded.tokenizer(context)["input_ids"]
    ids = loaded.tokenizer(context + continuation)["input_ids"]
    logits = loaded.model(input_ids=torch.tensor([ids])).logits[0].double()
    total, greedy = 0.0, True
    for position in range(len(context_ids), len(ids)):
        row = logits[position - 1]
        total += float(row[ids[position]] - torch.logsumexp(row, 0))
        greedy &= int(row.argmax()) == ids[position]
    return total, greedy


@torch.no_grad()
def test_prior_accuracies_equal_row_by_row_loglikelihoods(
    load: Callable[..., LoadedModel], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    for name, rows in {"choices": CHOICES, "winogrande": WINOGRANDE, "lambada": LAMBADA}.items():
        write_rows(rows, name=f"{name}.jsonl")
    for seed in range(4):
        loaded = load(seed=seed)
        results = {r.name: r for r in abilities(loaded, str(tmp_path))}
        texts = [
            ("Question: What floats?\nAnswer:", [" wood", " a stone of lead"], 0),
            ("He opened the door, because", [" it rang.", " he was asleep in bed."], 1),
            ("Kill flies.", [" Swat them.", " Sing to them softly."], 0),
        ]
        right = right_norm = 0
        for context, continuations, gold in texts:
            values = [reference_loglikelihood(loaded, context, c)[0] for c in continuations]
            right += max(range(2), key=lambda i: values[i]) == gold
            right_norm += max(range(2), key=lambda i: values[i] / (len(continuations[i]) - 1)) == gold
        assert results["choices"].accuracy == pytest.approx(right / 3)
        assert results["choices"].accuracy_norm == pytest.approx(right_norm / 3)
        pair = [reference_loglikelihood(loaded, c, " red car")[0] for c in ("Ann has the", "Bob owns the")]
        assert results["winogrande"].accuracy == float(pair[1] > pair[0])
        assert results["lambada"].accuracy == float(reference_loglikelihood(loaded, "once upon a", " time")[1])
        assert results["lambada"].accuracy_norm is None


def test_truncated_replies_are_noted_and_counted(
    load: Callable[..., LoadedModel], write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, chat = load(), chat_of(load())
    rows = [{"prompt": f"q{i}?", "answer": "a"} for i in range(3)]
    path = write_rows(rows, name="asked.jsonl")
    prompts = [chat.encode_prompt(row.prompt) for row in load_demonstrations(str(path))]
    cut = sum(rollout.truncated for rollout in sample(loaded, prompts, Sampling(48, temperature=0)))
    assert cut
    (found,) = abilities(loaded, str(path))
    assert found.truncated == cut
    said = capsys.readouterr().err
    scored = "replies stopped at the limit of 48 tokens and are scored as far as they go"
    assert said.count("note: ") == 1
    assert f"note: prior: {scored}: {cut} of 3 in asked; " in said
    (choices,) = abilities(loaded, str(write_rows(CHOICES, name="choices.jsonl")))
    assert choices.truncated is None
    assert "limit" not in capsys.readouterr().err


def test_truncated_replies_of_another_file_are_noted_later(
    load: Callable[..., LoadedModel], write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"q{i}?", "answer": "a"} for i in range(3)]
    with progress_shown(True):
        for name in ("asked", "asked", "other"):
            abilities(load(), str(write_rows(rows, name=f"{name}.jsonl")))
    said = capsys.readouterr().err
    assert [said.count(f"of 3 in {name}; ") for name in ("asked", "other")] == [1, 1]


@torch.no_grad()
def test_a_model_that_overflows_is_never_right(
    load: Callable[..., LoadedModel], write_rows: Callable[..., Path]
) -> None:
    loaded = load()
    loaded.model.lm_head.weight.fill_(math.nan)
    (result,) = abilities(loaded, str(write_rows(CHOICES)))
    assert (result.accuracy, result.accuracy_norm) == (0, 0)


@torch.no_grad()
def test_greedy_continuation_of_the_model_itself_counts_as_right(load: Callable[..., LoadedModel]) -> None:
    found = 0
    for seed in range(4):
        loaded = load(seed=seed)
        for context in "abcdefghijklmnopqrstuvwxyz":
            ids = loaded.tokenizer(context)["input_ids"]
            text = loaded.tokenizer.decode([int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())])
            if not (text.isascii() and text.isalnum()):
                continue
            found += 1
            rows = [Choices("x:1", ((context, more),), None) for more in (text, text + "~")]
            assert correct(loaded, rows) == [True, reference_loglikelihood(loaded, context, text + "~")[1]]
    assert found >= 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1, invalid JSON at character 2: "),
        (
            '{"query": "x", "choices": ["a", "b"], "gold": 3}',
            "line 1, column 'gold': found the number 3, expected an integer",
        ),
        (
            '{"query": "x", "choices": ["a", "b"], "gold": -1}',
            "column 'gold': found the number -1, expected an",
        ),
        (
            '{"query": "x", "choices": ["a", "b"], "gold": true}',
            "column 'gold': found true, expected an integer",
        ),
        ('{"query": "x", "choices": ["a", "b"], "gold": "1"}', "column 'gold': found '1', expected"),
        ('{"query": "x", "choices": ["a", "b"]}', "column 'gold': missing, expected an integer from 0 to 1"),
        (
            '{"query": "x", "choices": ["a"], "gold": 0}',
            "column 'choices': found a list of 1, expected a list of two",
        ),
        ('{"query": "x", "choices": "ab", "gold": 0}', "column 'choices': found 'ab', expected a list"),
        ('{"query": "x", "gold": 0}', "column 'choices': missing, expected a list"),
        (
            '{"query": "x", "choices": ["a", " "], "gold": 0}',
            "column 'choices[1]': found only whitespace, expected text",
        ),
        ('{"query": "x", "choices": [1, "a"], "gold": 0}', "column 'choices[0]': found the number 1, expected text"),
        ('{"query": " ", "choices": ["a", "b"], "gold": 0}', "column 'query': found only whitespace, expected text"),
        (
            '{"query": "x", "query": "y", "choices": ["a", "b"], "gold": 0}',
            "line 1, duplicate key 'query'",
        ),
        ('{"contexts": ["a", "b"], "gold": 0}', "line 1, column 'continuation': missing, expected text"),
        (
            '{"contexts": ["a", ""], "continuation": "c", "gold": 0}',
            "column 'contexts[1]': found empty text",
        ),
        (
            '{"contexts": ["a", "b"], "continuation": " ", "gold": 0}',
            "column 'continuation': found only whitespace",
        ),
        ('{"context": "a"}', "line 1, column 'continuation': missing, expected text"),
        ('{"context": " ", "continuation": "a"}', "column 'context': found only whitespace, expected text"),
        ('{"context": ["a"], "continuation": "a"}', "column 'context': found a list of 1, expected text"),
        ('{"context": "a", "continuation": null}', "column 'continuation': found null, expected text"),
        ('{"text": "a"}', "line 1, not a prior row, expected query + choices + gold"),
        ("[1]", "line 1, found a list of 1, expected an object"),
        (
            '[1]\n{"prompt": "a"}',
            "line 1, found a list of 1, expected an object; line 2, column 'completion'",
        ),
        ("", "no rows"),
    ],
)
def test_bad_prior_rows_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_prior(str(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_prior_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="or a folder without any"):
        load_prior(str(tmp_path / "none"))


def test_prior_files_of_the_package_are_named() -> None:
    assert load_prior("bundled:prior/test") == load_prior(packaged("prior/test"))
    assert list(load_prior("bundled:prior/test/facts.jsonl")) == ["facts"]
    with pytest.raises(
        UserError, match=r"^bundled:prior/tset: no such file in the package; did you mean bundled:prior"
    ):
        load_prior("bundled:prior/tset")


def test_real_prior_files_load() -> None:
    folder = SHARED_DATA / "prior"
    if not folder.is_dir():
        pytest.skip(f"REAL DATA NOT CHECKED: {folder} is missing")
    priors = load_prior(str(folder))
    assert {name: len(rows) for name, rows in priors.items()} == {
        "arc_easy": 200,
        "copa": 100,
        "lambada": 200,
        "piqa": 200,
        "winogrande": 200,
    }


def test_all_bad_rows_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    good = json.dumps(CHOICES[0])
    path.write_text("\n".join([good, "", *['{"context": "a"}'] * 12, "{"]) + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_prior(str(path))
    message = str(error.value)
    found = "has 'context' but line 1 has 'query'; use one form in the whole file; line 15, invalid JSON at character 2"
    assert message.startswith(f"{path}: 13 bad rows: lines 3, 4, 5 and 9 more: {found}")


def test_lines_are_read_as_those_of_demonstrations(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    row = {"context": "a\u2028b", "continuation": "c"}
    path.write_text("\ufeff\n" + json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_prior(str(path)) == {"p": [Choices(f"{path}:2", (("a\u2028b", " c"),), None)]}
    path.write_bytes(json.dumps({"context": "\u00e9", "continuation": "c"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8: line 1, byte 14 is 0xe9; save it as UTF-8"):
        load_prior(str(path))


def test_files_of_messages_are_questions_and_mixed_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    question = {"messages": [{"role": "user", "content": "q"}], "answer": "a"}
    path.write_text(json.dumps(question) + "\n", encoding="utf-8")
    assert load_prior(str(path)) == {"p": load_demonstrations(str(path))}
    for rows in ([question, CHOICES[0]], [CHOICES[0], question], [CHOICES[0], {"prompt": "q", "answer": "a"}]):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        with pytest.raises(UserError, match="1 bad row: line 2, "):
            load_prior(str(path))


def test_every_row_of_every_file_must_fit_the_window_before_anything_is_computed(
    load: Callable[..., LoadedModel], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    loaded = load()
    assert loaded.window == 512
    write_rows(CHOICES, name="a.jsonl")
    fits = {"context": "x" * 510, "continuation": "y"}
    b = write_rows([fits, fits | {"context": "x" * 511}], name="b.jsonl")
    c = write_rows([{"prompt": "q" * 500, "answer": "a"}], name="c.jsonl")
    with pytest.raises(UserError) as error:
        encode_priors(loaded, chat_of(loaded), load_prior(str(tmp_path)))
    message = str(error.value)
    assert message.startswith("prior: 2 rows are longer than the context window of 512 tokens of model ")
    assert f": {b}:2, {c}:1: 513, " in message
    assert message.endswith("; shorten or remove them")
    b.write_text(json.dumps(fits) + "\n", encoding="utf-8")
    c.unlink()
    assert [r.items for r in abilities(loaded, str(tmp_path))] == [3, 1]


def test_answers_of_prior_questions_are_checked_first(
    load: Callable[..., LoadedModel], write_rows: Callable[..., Path]
) -> None:
    loaded = load()
    path = write_rows([{"prompt": "q", "answer": "?!"}, {"prompt": "q", "answer": "a"}])
    with pytest.raises(UserError, match=":1: scorer 'contains' cannot use answer"):
        encode_priors(loaded, chat_of(loaded), load_prior(str(path)))


@torch.no_grad()
def test_empty_context_is_bos_else_eos(load: Callable[..., LoadedModel], write_rows: Callable[..., Path]) -> None:
    loaded = load()
    priors = load_prior(str(write_rows([{"context": "", "continuation": "ab"}])))
    text = loaded.tokenizer(" ab")["input_ids"]
    (encoded,) = encode_priors(loaded, chat_of(loaded), priors)
    assert (encoded.contexts, encoded.continuations) == ([[257]], [text])
    texts = [f" {letter}" for letter in "abcdefgh"]
    values = []
    for continuation in texts:
        ids = loaded.tokenizer(continuation)["input_ids"]
        logps = loaded.model(input_ids=torch.tensor([[257, *ids]])).logits[0].double().log_softmax(-1)
        values.append(sum(float(logps[i, token]) for i, token in enumerate(ids)))
    rows = [Choices("x:1", tuple(("", continuation) for continuation in texts), gold) for gold in range(len(texts))]
    assert correct(loaded, rows) == [value == max(values) for value in values]
    loaded.tokenizer.bos_token = "<|im_start|>"
    (encoded,) = encode_priors(loaded, chat_of(loaded), priors)
    assert encoded.contexts == [[256]]
