"""What every check of a config needs: its error, and which settings somebody has changed."""

from typing import Any

from models.sizes import Limits, outside

MOST_STEPS = 10**10
"""Steps, batches, samples of a batch: more is a slip of the pen."""
MOST_MINUTES = 366 * 24 * 60
"""A year: clocks of the standard library and of the back ends hold no thousands of them."""


class ConfigError(Exception):
    """A config that cannot be run; the message names the key, its value and the fix."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_within(section: str, values: Any, limits: Limits) -> None:
    """Raise ConfigError for the first field of `values` that is out of its limits."""
    wrong = outside(section, values, limits)
    require(wrong is None, wrong or "")


def changed_settings(section: Any, names: list[str]) -> list[str]:
    """Those of a section's settings that differ from their defaults."""
    default = type(section)()
    return [name for name in names if getattr(section, name) != getattr(default, name)]
