"""The parts of `python -m tools.report`: reading runs, drawing curves, writing the page and the picture."""
