"""Skill after skill."""

from selfdistill.continual.learn import LearnResult, learn

__all__ = ["LearnResult", "learn"]
