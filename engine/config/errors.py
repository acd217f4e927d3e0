"""The error of every check of a config."""


class ConfigError(Exception):
    """A config that cannot be run; the message names the key, its value and the fix."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(message)
