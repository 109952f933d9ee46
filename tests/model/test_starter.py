"""The starter model and real data: slow tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selfdistill.cli import main
from selfdistill.data.chat_format import ChatFormat
from selfdistill.model.loading import load_model
from selfdistill.model.sampling import Sampling, sample
from selfdistill.model.starter import starter_model_path

pytestmark = pytest.mark.slow
SKILLS = Path(__file__).resolve().parents[3] / "shared" / "data" / "skills"


def test_the_starter_model_knows_a_capital_and_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = starter_model_path("smollm2-135m")
    assert (folder / "model.safetensors").is_file()
    # The second time nothing is fetched.
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("tried to download"))
    assert starter_model_path("smollm2-135m") == folder
    loaded = load_model("smollm2-135m")
    chat = ChatFormat(loaded.tokenizer, loaded.end_token_ids, {})
    prompt = chat.encode_prompt([{"role": "user", "content": "What is the capital of France?"}])
    (rollout,) = sample(loaded, [prompt], Sampling(24, temperature=0))
    assert "Paris" in chat.decode(rollout.ids)
    assert not rollout.truncated


@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("skill", ["science", "medical", "tooluse"])
def test_real_skills_train_and_evaluate(skill: str, lora_rank: int, tmp_path: Path) -> None:
    if not SKILLS.is_dir():
        pytest.skip(f"REAL DATA NOT CHECKED: {SKILLS} is missing")
    shared = ["--model", "smollm2-135m", "--max_completion_length", "24", "--batch_size", "2"]
    run = tmp_path / "run"
    train = ["train", *shared, "--data", str(SKILLS / f"{skill}.train.jsonl"), "--output_dir", str(run)]
    train += ["--context", "turns:repeats=1", "--max_steps", "2", "--save_steps", "0", "--lora_rank", str(lora_rank)]
    assert main(train) == 0
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2]
    assert all(m["kl/forward"] > 0 and m["grad_norm"] > 0 for m in metrics)
    rows = (SKILLS / f"{skill}.test.jsonl").read_text().splitlines()[:4]
    (tmp_path / "test.jsonl").write_text("\n".join(rows) + "\n")
    scorer = {"science": "choice", "medical": "exact", "tooluse": "tool_call"}[skill]
    result = tmp_path / "result.json"
    evaluation = ["eval", *shared, "--data", str(tmp_path / "test.jsonl"), "--scorer", scorer, "--json", str(result)]
    evaluation[2] = str(run)
    assert main(evaluation) == 0
    assert json.loads(result.read_text())["items"] == 4
