"""Documents in, questions made of them, trained, and asked: self-distillation beside SFT, CPT and oracle RAG.

    python studies/knowledge.py DIR [SEED...]

The documents are those of the package's facts. The model itself writes the questions (`selfdistill questions`). Asked
are the package's own questions about the same documents, which no model saw: direct ones and indirect ones. Strict: the
answer stands in the reply. Lenient: at least half of its words do. Means over seeds with their 95% interval; for base
and for RAG the interval is over questions. What is done is not done again.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from selfdistill.command_config import EvalConfig, QuestionsConfig
from selfdistill.config import TrainConfig
from selfdistill.demonstrations import load_demonstrations
from selfdistill.distances import packaged
from selfdistill.evaluate import evaluate
from selfdistill.questions import make_questions
from selfdistill.statistics import seeds_interval, share_interval
from selfdistill.tracking import read_lines
from selfdistill.train import train

MODEL = "smollm2-135m"
METHODS = ("sdft", "sft", "cpt")
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


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower())) - {"a", "an", "the", "of", "in", "on"}


def lenient(answer: Any, reply: str) -> bool:
    """Whether half of the words of any of the answers stand in the reply."""
    answers = answer if isinstance(answer, list) else [answer]
    return any(2 * len(words(a) & words(reply)) >= len(words(a)) for a in map(str, answers))


def asked(name: str, model: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Strict and lenient shares on both sets of questions."""
    result: dict[str, Any] = {}
    for part in TESTS:
        replies = folder / f"{name}-{part}.jsonl"
        if not replies.exists():
            data = packaged(f"knowledge.{part}.jsonl")
            config = EvalConfig(model=model, data=data, replies=str(replies), max_completion_length=32, **more)
            evaluate(config)
        lines = read_lines(replies)
        result[f"{part}_strict"] = [line["correct"] for line in lines]
        result[f"{part}_lenient"] = [line["correct"] or lenient(line["answer"], line["reply"]) for line in lines]
    return result


def cell(runs: list[list[bool]]) -> str:
    shares = [sum(right) / len(right) for right in runs]
    middle, low, high = seeds_interval(shares)
    if len(runs) == 1:
        low, high = share_interval(sum(runs[0]), len(runs[0]))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


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
    rows = {
        "base": [asked("base", MODEL, folder)],
        "oracle RAG": [asked("rag", MODEL, folder, context="document:show=document")],
    }
    for method in METHODS:
        rows[method] = []
        for seed in seeds:
            run = folder / f"{method}-{seed}"
            if not (run / "final").exists():
                train(
                    TrainConfig(
                        model=MODEL,
                        data=str(questions / "train.jsonl"),
                        output_dir=str(run),
                        method=method,  # type: ignore[arg-type]
                        seed=seed,
                        **RUN,
                    )
                )
            rows[method].append(asked(run.name, str(run), folder))
    columns = [f"{part}_{how}" for part in TESTS for how in ("strict", "lenient")]
    print(f"| | {' | '.join(column.replace('_', ', ') for column in columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name, runs in rows.items():
        print(f"| {name} | {' | '.join(cell([run[column] for run in runs]) for column in columns)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]] or [0, 1, 2])
