"""Recorded trajectories of the teacher: Parquet schema, shards, and the stage that writes them."""
