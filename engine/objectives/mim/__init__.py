"""Masked-feature distillation as a training objective: teacher, exchange of pixels and targets, step (docs/mim.md)."""
