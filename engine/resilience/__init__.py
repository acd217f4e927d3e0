"""What keeps a run going: signals, agreement between steps, the end of a run and what it leaves to read."""
