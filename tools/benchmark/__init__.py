"""Throughput of a configuration: measured on its ranks, swept over layouts, compared (docs/benchmarking.md)."""
