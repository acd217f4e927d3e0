"""A suite of evaluation sets on one checkpoint: features once, measures, tables, a page."""
