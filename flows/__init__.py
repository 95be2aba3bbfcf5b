"""Flows: one per stage, with one or more deployments each; they decide where and when a stage runs."""
