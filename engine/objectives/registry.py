"""The objectives there are. A new one is a folder beside this file and one line here."""

from engine.config.errors import ConfigError
from engine.config.schema import Config
from engine.objectives.base import Objective
from engine.objectives.contrastive.objective import Contrastive
from engine.objectives.mim.objective import Mim

OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (Contrastive(), Mim())}


def objective_of(config: Config) -> Objective:
    """The objective that a config asks for; ConfigError if there is none of that name."""
    if config.objective not in OBJECTIVES:
        raise ConfigError(f"objective is {config.objective!r}: choose {' or '.join(OBJECTIVES)}")
    return OBJECTIVES[config.objective]
