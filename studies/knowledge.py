"""Documents in, questions made of them, trained, and asked: self-distillation beside SFT, CPT and oracle RAG.

    python studies/knowledge.py DIR [SEED...]

The documents are those of the package's facts. Learnt are the questions that the model itself writes about them
(`selfdistill questions`), and those of the package, written by hand; CPT reads the documents. Asked are the package's
held-out questions about the same documents: direct ones, of these also the ones whose answer is in a question that the
model made, and indirect ones. Strict: the reply contains the answer. Lenient: at least half of its words do.
"Prior" is the share of the package's general questions that is still answered. Means over seeds with their 95%
interval; for one seed, base and RAG the interval is over questions. Finished work is not repeated;
DIR/knowledge.json has every item.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from intervals import cell, interval_text

from selfdistill.config.commands import EvalConfig, QuestionsConfig
from selfdistill.config.train import TrainConfig
from selfdistill.data.bundled import packaged
from selfdistill.data.demonstrations import load_demonstrations
from selfdistill.evaluation.evaluate import evaluate
from selfdistill.evaluation.statistics import share_interval
from selfdistill.questions import make_questions
from selfdistill.runtime.tracking import read_lines
from selfdistill.training.train import train

MODEL = "smollm2-135m"
RUNS = {
    "SDFT, questions of the model": ("sdft", "made"),
    "SFT, questions of the model": ("sft", "made"),
    "SDFT, questions of the package": ("sdft", "package"),
    "SFT, questions of the package": ("sft", "package"),
    "CPT on the documents": ("cpt", "package"),
}
"""Method and questions."""
RUN: dict[str, Any] = {
    "context": "document:repeats=2",
    "teacher": "frozen",
    "temperature": 0.3,
    "learning_rate": 1e-4,
    "max_completion_length": 32,
    "batch_size": 16,
    "max_steps": 80,
    "save_steps": 0,
    "view_rows": 0,
    "logging_steps": 20,
}
TESTS = ("test", "indirect")
COLUMNS = {
    "test_strict": "direct, strict",
    "test_lenient": "direct, lenient",
    "test_reached": "direct, in the model's questions",
    "indirect_strict": "indirect, strict",
    "indirect_lenient": "indirect, lenient",
    "prior": "prior",
}
"""What is asked, and what it is called."""


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower())) - {"a", "an", "the", "of", "in", "on"}


def lenient(answer: Any, reply: str) -> bool:
    """Whether half of the words of any of the answers stand in the reply."""
    answers = answer if isinstance(answer, list) else [answer]
    return any(2 * len(words(a) & words(reply)) >= len(words(a)) for a in map(str, answers))


def asked(name: str, model: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Strict and lenient answers to both sets of questions, and what is right of the package's prior questions."""
    result: dict[str, Any] = {}
    for part in TESTS:
        replies = folder / f"{name}-{part}.jsonl"
        if not replies.exists():
            data = packaged(f"knowledge.{part}.jsonl")
            config = EvalConfig(
                model=model, data=data, replies=str(replies), max_completion_length=32, mixed_precision="no", **more
            )
            evaluate(config)
        lines = read_lines(replies)
        result[f"{part}_strict"] = [line["correct"] for line in lines]
        result[f"{part}_lenient"] = [line["correct"] or lenient(line["answer"], line["reply"]) for line in lines]
    kept = folder / f"{name}-prior.json"
    if not kept.exists():
        data, prior = packaged("knowledge.test.jsonl"), packaged("prior/test/facts.jsonl")
        found = evaluate(
            EvalConfig(model=model, data=data, prior=prior, max_completion_length=32, mixed_precision="no")
        )["prior"]
        kept.write_text(json.dumps(found["facts"]["correct"]) + "\n", encoding="utf-8")
    result["prior"] = json.loads(kept.read_text(encoding="utf-8"))
    return result


def share(runs: list[list[bool]]) -> str:
    shares = [sum(right) / len(right) for right in runs]
    if len(runs) > 1:
        return cell(shares)
    return f"{shares[0]:.2f}{interval_text(*share_interval(sum(runs[0]), len(runs[0])))}"


def line(name: str, runs: list[dict[str, list[bool]]]) -> str:
    return f"| {name} | {' | '.join(share([run[column] for run in runs]) for column in COLUMNS)} |"


def in_questions(file: str) -> list[bool]:
    """Of each held-out direct question whether its answer is in any question of a file, or holds that one's."""
    known = [words(row.answer) for row in load_demonstrations(file) if isinstance(row.answer, str)]
    rows = load_demonstrations(packaged("knowledge.test.jsonl"))
    answers = [[row.answer] if isinstance(row.answer, str) else row.answer or [] for row in rows]
    return [any(words(a) and (words(a) <= k or k <= words(a)) for a in many for k in known) for many in answers]


def main(folder: Path, seeds: list[int]) -> None:
    documents, questions = folder / "documents", folder / "questions"
    documents.mkdir(parents=True, exist_ok=True)
    texts = dict.fromkeys(row.document or "" for row in load_demonstrations(packaged("knowledge.train.jsonl")))
    for number, text in enumerate(texts):
        (documents / f"{number}.txt").write_text(text, encoding="utf-8")
    made = folder / "made.json"
    if not made.exists():
        config = QuestionsConfig(documents=str(documents), output_dir=str(questions), model=MODEL, tries=4)
        made.write_text(json.dumps(make_questions(config)), encoding="utf-8")
    print(made.read_text(encoding="utf-8"))
    data = {"made": str(questions / "train.jsonl"), "package": packaged("knowledge.train.jsonl")}
    reached = in_questions(data["made"])
    rows = {
        "base": [asked("base", MODEL, folder)],
        "oracle RAG": [asked("rag", MODEL, folder, context="document:show=document")],
    }
    for name, (method, source) in RUNS.items():
        rows[name] = []
        for seed in seeds:
            run = folder / f"{method}-{source}-{seed}"
            if not (run / "final").exists():
                place: dict[str, Any] = {"model": MODEL, "data": data[source], "output_dir": str(run)}
                train(TrainConfig(**place, **RUN, method=method, seed=seed))  # type: ignore[arg-type]
            rows[name].append(asked(run.name, str(run), folder))
    for runs in rows.values():
        for run in runs:
            run["test_reached"] = [right for right, known in zip(run["test_strict"], reached, strict=True) if known]
    (folder / "knowledge.json").write_text(json.dumps(rows) + "\n", encoding="utf-8")
    print(f"{sum(reached)} of {len(reached)} answers are in the model's own questions")
    print(f"| | {' | '.join(COLUMNS.values())} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, runs in rows.items():
        print(line(name, runs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]] or [0, 1, 2])
