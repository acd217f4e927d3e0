"""The two failures of the data room: one that a user must mend, one that is counted and replaced."""


class DataError(Exception):
    """Bad shard, shard list, setting, or too much bad data; the message carries the values and the fix."""


class Rejected(Exception):
    """One sample cannot be used; `reason` is a short fixed word under which it is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
