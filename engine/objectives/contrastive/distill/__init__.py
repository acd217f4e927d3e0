"""Distillation of frozen CLIPs into the one in training, beside its contrastive loss (docs/distillation.md)."""
