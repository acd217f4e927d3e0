"""What the server that disturbed ranks are forked from has ready beside the imports of tests/preload.py."""

import engine.callbacks.console
import engine.callbacks.history
import engine.callbacks.metrics
import engine.callbacks.suite  # noqa: F401
from data.bpe import encoder

encoder()  # half a second of every rank's start
