"""What a block does between its matrix products, in as few passes over memory as there can be (block.py)."""
