"""Benchmarks: decode with teacher and students, judge, select thresholds, compare and report."""
