"""The work behind tools.convert."""
