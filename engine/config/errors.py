"""What every check of a config needs: its error, and which settings somebody has changed."""

from typing import Any


class ConfigError(Exception):
    """A config that cannot be run; the message names the key, its value and the fix."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def changed_settings(section: Any, names: list[str]) -> list[str]:
    """Those of a section's settings that differ from their defaults."""
    default = type(section)()
    return [name for name in names if getattr(section, name) != getattr(default, name)]
