"""The part of a report with replies to test rows, before and after training."""

from __future__ import annotations

import json
from collections.abc import Sequence

from selfdistill.comparison.run_folders import Json, Part, RunFolder
from selfdistill.data import as_transcript
from selfdistill.errors import number_of


def first_of_each(part: Part, runs: Sequence[RunFolder]) -> list[RunFolder]:
    """The runs; in a comparison, the first of each method."""
    if part.comparison is None:
        return list(runs)
    method = {run["name"]: run["method"] for run in part.comparison["runs"]}
    return list({method[run.name]: run for run in reversed(runs)}.values())[::-1]


def shown_replies(run: RunFolder) -> Json:
    """A run's kept replies, or episodes, row by row: those of step 0, and of the last evaluated step."""
    rows: dict[str, Json] = {}
    for line in run.replies:
        *before, prompt = line["prompt"]
        row = {"row": line["source"], "before": as_transcript(before), "prompt": prompt["content"], "replies": []}
        row = rows.setdefault(line["source"], row | {"answer": _text(line["answer"])})
        row["replies"].append({"heading": f"Step {line['step']}, {_verdict(line)}", "text": _said(line)})
        row["verdict"] = ", then ".join(filter(None, [row.get("verdict"), _right(line)]))
    return {"run": run.name, "rows": list(rows.values())}


def _text(answer: object) -> str:
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def _right(line: Json) -> str:
    return "right" if line["correct"] else "wrong"


def _verdict(line: Json) -> str:
    """Whether a reply is right; of an episode, also its length, reward and feedback."""
    if "messages" not in line:
        return _right(line)
    end = f": {line['feedback']}" if line["feedback"] else ""
    return f"{_right(line)}, {number_of(line['turns'], 'turn')}, reward {line['reward']:.2f}{end}"


def _said(line: Json) -> str:
    """A reply, or the transcript of an episode."""
    if "messages" in line:
        return as_transcript(line["messages"])
    return line["reply"] if line["reply"].strip() else "(empty reply)"
