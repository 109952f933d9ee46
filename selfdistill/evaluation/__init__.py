"""Evaluate models; nothing here trains the model that it is given."""

from selfdistill.evaluation.answers import answer, check_answers
from selfdistill.evaluation.asked import AskResult, ask
from selfdistill.evaluation.check import LAYOUTS, best_context, check, check_run
from selfdistill.evaluation.check_result import CheckResult
from selfdistill.evaluation.distances import DRIFT_PROMPTS, DRIFT_TOKENS, Distance, drift_from, mean_loss
from selfdistill.evaluation.endpoint import Endpoint, ask_all
from selfdistill.evaluation.episodes import unscored
from selfdistill.evaluation.eval_result import EvalResult, detected, summary
from selfdistill.evaluation.evaluate import (
    Evaluation,
    EvaluationSet,
    evaluate,
    prior_difference,
    prior_scores,
    rows_fingerprint,
)
from selfdistill.evaluation.evaluator import Evaluator, check_inputs, say_learnt
from selfdistill.evaluation.generate import (
    SYSTEM_TURN,
    generate,
    note_on_chats,
    note_on_environment,
    run_of,
    shared_system_turn,
    system_turn_of,
    with_system_turn,
)
from selfdistill.evaluation.judge import judge_of
from selfdistill.evaluation.priors import encode_priors, load_prior
from selfdistill.evaluation.statistics import seeds_interval, share_interval, sign_test

__all__ = [
    "DRIFT_PROMPTS",
    "DRIFT_TOKENS",
    "LAYOUTS",
    "SYSTEM_TURN",
    "AskResult",
    "CheckResult",
    "Distance",
    "Endpoint",
    "EvalResult",
    "Evaluation",
    "EvaluationSet",
    "Evaluator",
    "answer",
    "ask",
    "ask_all",
    "best_context",
    "check",
    "check_answers",
    "check_inputs",
    "check_run",
    "detected",
    "drift_from",
    "encode_priors",
    "evaluate",
    "generate",
    "judge_of",
    "load_prior",
    "mean_loss",
    "note_on_chats",
    "note_on_environment",
    "prior_difference",
    "prior_scores",
    "rows_fingerprint",
    "run_of",
    "say_learnt",
    "seeds_interval",
    "share_interval",
    "shared_system_turn",
    "sign_test",
    "summary",
    "system_turn_of",
    "unscored",
    "with_system_turn",
]
