"""Skill after skill."""

from selfdistill.continual.learn import learn

__all__ = ["learn"]
