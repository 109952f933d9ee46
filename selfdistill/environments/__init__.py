"""Environments: the tools, games and checkers that answer the model in an episode."""

from selfdistill.environments.factory import IN_PYTHON, make_environment, name_of_given
from selfdistill.environments.protocol import Environment, EnvironmentFactory, Step
from selfdistill.environments.shop import PRODUCTS, price_of, stock_of
from selfdistill.environments.threads import THREADS, in_threads

__all__ = [
    "IN_PYTHON",
    "PRODUCTS",
    "THREADS",
    "Environment",
    "EnvironmentFactory",
    "Step",
    "in_threads",
    "make_environment",
    "name_of_given",
    "price_of",
    "stock_of",
]
