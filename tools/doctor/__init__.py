"""What this machine has, what the engine will use of it, and what is wrong with it."""
