"""Environments: the tools, games and checkers that answer the model in an episode."""

from selfdistill.environments.factory import IN_PYTHON, make_environment, name_of_functions
from selfdistill.environments.protocol import Environment, EnvironmentFactory, Step
from selfdistill.environments.runner import ToolRunner
from selfdistill.environments.shop import PRODUCTS, price_of, stock_of

__all__ = [
    "IN_PYTHON",
    "PRODUCTS",
    "Environment",
    "EnvironmentFactory",
    "Step",
    "ToolRunner",
    "make_environment",
    "name_of_functions",
    "price_of",
    "stock_of",
]
