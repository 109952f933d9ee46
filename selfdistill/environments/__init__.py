"""What answers the model in an episode: tools, games and checkers."""

from selfdistill.environments.factory import make_environment
from selfdistill.environments.protocol import Environment, EnvironmentFactory, Step

__all__ = ["Environment", "EnvironmentFactory", "Step", "make_environment"]
