"""A trained model as an nn.Module of one process, for notebooks and scripts: `from engine import load_model`."""
