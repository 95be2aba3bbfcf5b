"""Benchmarks, metrics, measurements, and the comparison of a teacher with its students."""
