"""Framework-independent part."""

from transformer_engine.common import recipe as recipe
