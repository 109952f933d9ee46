"""Generate questions about documents, with the model itself or another one, each grounded in its passage.

For every sentence of a passage, a question with a short answer is requested. It is accepted if the answer occurs in the
passage, the question is clear without the passage, it is new, and the model, given the passage, answers it the same way
(round-trip filtering, as in Alberti et al. 2019, arXiv 1906.05416). Each accepted question is then paraphrased, and one
paraphrase is held out for the test. So is, where possible, an indirect question, whose answer is the passage's topic.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from selfdistill.config import QuestionsConfig, TrainConfig
from selfdistill.data import (
    WORD,
    Demonstration,
    Document,
    Message,
    first_ten,
    includes,
    is_one_text,
    load_demonstrations,
    score,
    thought_and_said,
    words_of,
    write_demonstrations,
)
from selfdistill.documents import Passage, ends_as_question, goes_beyond, load_passages, only_words, sentences
from selfdistill.errors import UserError
from selfdistill.evaluation import Endpoint, answer, ask_all
from selfdistill.model import (
    Sampling,
    load_for_training,
    prompts_at_a_time,
    sample,
    sample_seed,
    start_fingerprint,
    use_engine,
)
from selfdistill.runtime import Printable, ProgressBar, drop_partial_line, read_lines, refuse_edited, say, write_own

ASK_TOKENS = 64
"""Maximum length of a question with its answer, in tokens."""
TEMPERATURE = 0.7
"""Sampling temperature of every try after the first, which is greedy."""

_TEXT = (
    "The Osk Bridge is a footbridge of red larch. It was built by the carpenter Ilse Brandt in one summer. Nobody may "
    "cross it with a lit lamp."
)


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


_DIRECT = (
    "Read the text.\n\n{text}\n\nWrite one question about this sentence: {sentence}\nName what the question is about, "
    "so that it can be understood without the text. Then give the answer in a few words of the text."
)
_OTHER_WORDS = "Ask the same in other words, in one question: {question}"
_INDIRECT = (
    "Read the text.\n\n{text}\n\nWrite one question whose answer is the name of what the text is about, using this "
    "fact: {sentence}\nDo not say the name in the question. Then give the name."
)


def _form(question: str, answer_: str) -> str:
    return f"Question: {question}\nAnswer: {answer_}"


_SHOWN: dict[str, list[tuple[str, str]]] = {
    "direct": [
        (
            _DIRECT.format(text=_TEXT, sentence="It was built by the carpenter Ilse Brandt in one summer."),
            _form("Who built the Osk Bridge?", "Ilse Brandt"),
        ),
        (
            _DIRECT.format(text=_TEXT, sentence="The Osk Bridge is a footbridge of red larch."),
            _form("What is the Osk Bridge made of?", "red larch"),
        ),
    ],
    "other words": [
        (_OTHER_WORDS.format(question="Who built the Osk Bridge?"), "Which carpenter made the Osk Bridge?"),
        (
            _OTHER_WORDS.format(question="What is the Osk Bridge made of?"),
            "Of which material does the Osk Bridge consist?",
        ),
    ],
    "indirect": [
        (
            _INDIRECT.format(text=_TEXT, sentence="It was built by the carpenter Ilse Brandt in one summer."),
            _form("Which footbridge did Ilse Brandt build in one summer?", "the Osk Bridge"),
        ),
        (
            _INDIRECT.format(text=_TEXT, sentence="Nobody may cross it with a lit lamp."),
            _form("On which bridge is a lit lamp forbidden?", "the Osk Bridge"),
        ),
    ],
}
"""Few-shot examples for each kind of request, as earlier turns."""


MOST_WORDS, MOST_CHARACTERS = 12, 36
"""Maximum length of an answer, in words; in scripts without spaces, in characters."""
_REFERS = re.compile(r"\b(this|the|that) (text|passage|sentence|article|document|fact|paragraph)\b", re.IGNORECASE)


def make_questions(config: QuestionsConfig) -> dict[str, Any]:
    """``selfdistill questions``: write ``train.jsonl``, ``test.jsonl`` and ``indirect.jsonl`` to ``output_dir``.

    Replies are cached in ``asked.jsonl`` there. ``rejected.jsonl`` has every rejected question with the reason.

    Returns:
        ``passages``, ``train``, ``test``, ``indirect`` (counts) and ``rejected`` (counts by reason, most frequent
        first).

    Raises:
        UserError: there are no documents, the endpoint or model cannot be used, every question was rejected, or a file
            to be replaced was edited or is not of this command.
    """
    refuse_edited([Path(config.output_dir) / f"{name}.jsonl" for name in ("train", "test", "indirect")])
    passages = load_passages(config.documents, max_words=config.passage_words)
    maker = _Maker(config)
    units = [_Unit(passage, sentence) for passage in passages for sentence in sentences(passage.text)]
    direct: list[_Unit] = []
    for number in range(config.tries):
        asked = [_DIRECT.format(text=unit.passage.text, sentence=unit.sentence) for unit in units]
        direct += maker.keep("direct", units, asked, number)
    direct = maker.undisputed(direct)
    if not direct:
        reasons = ", ".join(f"{count} {reason}" for reason, count in maker.rejected.most_common())
        raise UserError(
            f"documents {config.documents!r}: all {len(units) * config.tries} questions were rejected: {reasons} "
            f"(see {maker.folder / 'rejected.jsonl'}); let another model write them with writer_url and writer_model"
        )
    train, test = list(direct), list[_Unit]()
    for number in range(config.phrasings + 1):
        asked = [_OTHER_WORDS.format(question=unit.question) for unit in direct]
        other = maker.keep("other words", direct, asked, number)
        held = {(unit.passage.source, unit.answer) for unit in test}
        for unit in other:
            (train if (unit.passage.source, unit.answer) in held else test).append(unit)
    asked = [_INDIRECT.format(text=unit.passage.text, sentence=unit.sentence) for unit in direct]
    indirect = maker.keep("indirect", direct, asked, 0)
    train, test, indirect = map(maker.undisputed, (train, test, indirect))
    for name, rows in (("train", train), ("test", test), ("indirect", indirect)):
        demonstrations = [unit.demonstration for unit in rows]
        write_own(maker.folder / f"{name}.jsonl", partial(write_demonstrations, demonstrations=demonstrations))
    found = {"passages": len(passages), "train": len(train), "test": len(test), "indirect": len(indirect)}
    return {**found, "rejected": dict(maker.rejected.most_common())}


def with_questions(config: TrainConfig) -> TrainConfig:
    """Generate questions about a run's documents, and set them as ``data`` and, if not given, ``test``."""
    assert config.documents
    folder = Path(f"{config.output_dir.rstrip('/')}-questions")
    shared = {name: getattr(config, name) for name in QuestionsConfig.model_fields.keys() & TrainConfig.model_fields}
    found = make_questions(QuestionsConfig(**shared | {"output_dir": str(folder)}))
    about = len({row.document for row in load_demonstrations(str(folder / "train.jsonl"))})
    passages = f"{about} of {found['passages']} passages with at least one accepted question"
    say(f"{found['train']} training and {found['test']} test questions in {folder} ({passages})")
    if found["rejected"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in found["rejected"].items())
        say(f"rejected: {reasons} (see {folder / 'rejected.jsonl'})")
    test = config.test or (str(folder / "test.jsonl") if found["test"] else None)
    if not test:
        none = f"every paraphrase was rejected (see {folder / 'rejected.jsonl'}), so there is no test"
        if config.eval_steps or config.prior:
            raise UserError(f"documents {config.documents!r}: {none}; give a test, or leave eval_steps and prior out")
        say(f"note: {none}; give a test to evaluate the run")
    return TrainConfig(**config.model_dump() | {"documents": None, "data": str(folder / "train.jsonl"), "test": test})


@dataclass(frozen=True)
class _Unit:
    """A sentence of a passage, with a question about it, if any."""

    passage: Passage
    sentence: str
    question: str = ""
    answer: str = ""

    @property
    def demonstration(self) -> Demonstration:
        """The question as a demonstration whose completion is the answer."""
        prompt = (_turn("user", self.question),)
        return Demonstration(
            prompt, self.answer, self.passage.text, answer=self.answer, scorer="contains", source=self.passage.source
        )


class _Maker:
    """Requests questions and accepts those that are grounded."""

    def __init__(self, config: QuestionsConfig) -> None:
        self.folder = Path(config.output_dir)
        self._asked, self._reasons = self.folder / "asked.jsonl", self.folder / "rejected.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            drop_partial_line(self._asked)
            self._reasons.write_text("", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be written ({error.strerror}); choose another place") from None
        self.rejected: Counter[str] = Counter()
        self.disputed: set[str] = set()
        """Normalised questions with conflicting answers."""
        self._config, self._answers = config, dict[str, str]()
        self._loaded = load_for_training(
            config.model, dtype=config.dtype, adapter_base=config.adapter_base, load_in_4bit=config.load_in_4bit
        )
        use_engine(self._loaded, config)
        self._chat = self._loaded.chat(config.chat_template_kwargs)
        self._endpoint: Endpoint | None = None
        if config.writer_url and config.writer_model:
            note = f"replies are cached in {self.folder}"
            self._endpoint = Endpoint(config.writer_url, config.writer_model, "writer", note)
        of_weights = None if self._endpoint else start_fingerprint(self._loaded)
        self._model = of_weights or config.model
        self._kept: dict[str, str] = {line["key"]: line["reply"] for line in read_lines(self._asked)}

    def keep(self, kind: str, units: Sequence[_Unit], requests: Sequence[str], number: int) -> list[_Unit]:
        """Request a question of this kind for each unit, for the ``number``-th time; return the accepted ones."""
        sound: list[_Unit] = []
        for unit, reply in zip(units, self._replies(kind, units, requests, number), strict=True):
            known = unit.answer if kind == "other words" else None
            question, said = _parsed(reply, known)
            made = replace(unit, question=question, answer=said)
            reason = self._problem(made, kind)
            if reason:
                self._reject(made, reason, reply)
            else:
                self._answers[only_words(question)] = said
                sound.append(made)
        rows = [unit.demonstration for unit in sound]
        prompts = [self._chat.encode_prompt(Document(show="document").messages(row, rows)) for row in rows]
        self._check_room("its question", [row.source for row in rows], prompts)
        answered = answer(
            self._loaded,
            prompts,
            rows,
            self._chat,
            Sampling(ASK_TOKENS, temperature=0),
            batch_size=self._config.batch_size,
            what="questions answered from their text",
        )
        kept = []
        for unit, right, reply in zip(sound, answered.correct, answered.replies, strict=True):
            if right:
                kept.append(unit)
            else:
                del self._answers[only_words(unit.question)]
                self._reject(unit, "answered differently from the text", reply)
        return kept

    def _problem(self, unit: _Unit, kind: str) -> str | None:
        """Why a question is rejected, or None."""
        if not ends_as_question(unit.question) or not any(map(str.isalnum, unit.answer)):
            return "no question with an answer"
        if len(unit.answer.split()) > MOST_WORDS or len(WORD.findall(unit.answer)) > MOST_CHARACTERS:
            return "answer too long"
        if not is_one_text(unit.demonstration):
            return "answer is a list or a formula"
        if not score("contains", unit.passage.text, unit.demonstration):
            return "answer not in the text"
        if score("contains", unit.question, unit.demonstration):
            return "question contains the answer"
        if _REFERS.search(unit.question):
            return "question not clear without the text"
        if goes_beyond(unit.question, unit.passage.text):
            return "question goes beyond the text"
        question = only_words(unit.question)
        if question not in self._answers:
            return None
        one, other = words_of(self._answers[question]), words_of(unit.answer)
        if not includes(one, other) and not includes(other, one):
            self.disputed.add(question)
        return "duplicate question"

    def undisputed(self, units: Sequence[_Unit]) -> list[_Unit]:
        """Drop the units whose question has conflicting answers, because the correct one is unknown."""
        kept = []
        for unit in units:
            if only_words(unit.question) in self.disputed:
                self._reject(unit, "conflicting answers to the same question", "")
            else:
                kept.append(unit)
        return kept

    def _reject(self, unit: _Unit, reason: str, reply: str) -> None:
        """Count and record a rejected question."""
        self.rejected[reason] += 1
        line = {"source": unit.passage.source, "question": unit.question, "answer": unit.answer, "reply": reply}
        _append(self._reasons, {"reason": reason, **line})

    def _replies(self, kind: str, units: Sequence[_Unit], requests: Sequence[str], number: int) -> list[str]:
        """One reply per request, from the cache or requested."""
        shown = [turn for asked, said in _SHOWN[kind] for turn in (_turn("user", asked), _turn("assistant", said))]
        chats = [[*shown, _turn("user", request)] for request in requests]
        temperature = TEMPERATURE if number else 0.0
        config = self._config
        who = [self._model, config.chat_template_kwargs, config.writer_url, config.writer_model, config.seed, number]
        asked = [json.dumps([*who, ASK_TOKENS, temperature, chat]) for chat in chats]
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in asked]
        open_ = {key: chat for key, chat in zip(keys, chats, strict=True) if key not in self._kept}
        of = {key: unit.passage.source for key, unit in zip(keys, units, strict=True)}
        with ProgressBar(f"questions ({kind})", len(open_), quiet=not open_) as reporter:
            written = self._by_endpoint(open_, temperature) if self._endpoint else self._by_model(open_, of, number)
            for done, (key, reply) in enumerate(written, start=1):
                self._kept[key] = reply
                _append(self._asked, {"key": key, "reply": reply})
                reporter.advance(done)
        return [self._kept[key] for key in keys]

    def _by_endpoint(self, chats: dict[str, list[Message]], temperature: float) -> Iterator[tuple[str, str]]:
        """Yield replies as they arrive; after a permanent failure, do not wait for the others."""
        assert self._endpoint is not None
        stop = threading.Event()
        ask = partial(self._endpoint.ask, stop=stop, max_tokens=ASK_TOKENS, temperature=temperature)
        return ask_all(lambda key: ask(chats[key]), list(chats), stop)

    def _by_model(self, chats: dict[str, list[Message]], of: dict[str, str], number: int) -> Iterator[tuple[str, str]]:
        """Yield replies of the model itself, greedy at the first try; the chats are of these passages."""
        prompts = {key: self._chat.encode_prompt(chat) for key, chat in chats.items()}
        self._check_room("the request", [of[key] for key in prompts], list(prompts.values()))
        keys, size = list(prompts), prompts_at_a_time(self._loaded, self._config.batch_size)
        for start in range(0, len(keys), size):
            part = keys[start : start + size]
            ids = [prompts[key] for key in part]
            seeds = [sample_seed(self._config.seed, number, hash_of(prompt), 0) for prompt in ids]
            sampling = Sampling(ASK_TOKENS, TEMPERATURE if number else 0.0)
            rollouts = sample(self._loaded, ids, sampling, seeds if number else None)
            for key, prompt, rollout in zip(part, ids, rollouts, strict=True):
                yield key, thought_and_said(self._chat, prompt, rollout.ids)[1]

    def _check_room(self, what: str, sources: Sequence[str], prompts: Sequence[Sequence[int]]) -> None:
        """Check that each prompt (a passage with ``what``) plus a reply fits into the model's context window."""
        window, longest = self._loaded.window, max(map(len, prompts), default=0)
        if window is not None and longest + ASK_TOKENS > window:
            long = dict.fromkeys(s for s, ids in zip(sources, prompts, strict=True) if len(ids) + ASK_TOKENS > window)
            raise UserError(
                f"documents {self._config.documents!r}: a passage with {what} has {longest} tokens, too many for the "
                f"context window of {window} ({first_ten(list(long))}); lower passage_words, and break long lines"
            )


def _append(file: Path, line: dict[str, str]) -> None:
    """Append a line to a JSON Lines file."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def hash_of(ids: Sequence[int]) -> int:
    """A hash of token ids, for seeds."""
    return int.from_bytes(hashlib.sha256(json.dumps(list(ids)).encode()).digest()[:6], "big")


def _parsed(reply: str, known: str | None) -> tuple[str, str]:
    """Parse the question and answer of a reply; if the answer is ``known``, the reply is only the question."""
    if known is not None:
        return reply.strip().split("\n")[0].removeprefix("Question:").strip(), known
    found = re.search(r"Question:\s*(.+?)\s*\n\s*Answer:\s*([^\n]+)", reply)
    return (found[1].strip(), found[2].strip().rstrip(".\u3002\u0964\u06d4")) if found else ("", "")


@dataclass(frozen=True, repr=False)
class QuestionsResult(Printable):
    """What was made of a folder of documents."""

    output_dir: Path
    details: dict[str, Any]
    """As ``selfdistill questions --json`` writes it."""

    def print(self, console: Console) -> None:
        """One line: how many questions there are, and why others were rejected."""
        found = self.details
        rejected = ", ".join(f"{count} {reason}" for reason, count in found["rejected"].items()) or "none"
        line = (
            f"{found['train']} training questions, {found['test']} test questions and {found['indirect']} indirect "
            f"ones from {found['passages']} passages, in {self.output_dir}; rejected: {rejected}"
        )
        console.print(line, markup=False, highlight=False, soft_wrap=True)
