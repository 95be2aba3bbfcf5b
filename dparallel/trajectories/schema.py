"""The Parquet contract of a trajectory shard: one row per decoded prompt.

`response_ids`, `commit_step` and `confidence` have one entry for each of the G response
positions; the canvas that forward s saw is `where(commit_step < s, response_ids, mask)`.
"""

import json

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from dparallel.config.base import UserError
from dparallel.config.decoding import DecodingConfig

SCHEMA_VERSION = 1
SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("source", pa.string()),
        ("prompt", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("commit_step", pa.list_(pa.int16())),
        ("confidence", pa.list_(pa.float32())),  # probability at commit
        ("response", pa.string()),
        ("reference", pa.string()),  # null where none is known
        ("correct", pa.bool_()),  # null where unknown
        ("nfe", pa.int32()),
        ("num_tokens", pa.int32()),  # up to and with the first EOS
        ("seed", pa.int64()),  # null where tokens were not drawn
    ]
)
METADATA_KEY = b"dparallel.trajectories"


class ForeignShardError(UserError):
    """A Parquet file that is no trajectory shard of this version; the message says what differs."""


class ShardMetadata(BaseModel):
    """What made a shard; written into its Parquet metadata."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    teacher: str  # fingerprint
    tokenizer: str  # fingerprint
    decoding: DecodingConfig


def with_metadata(metadata: ShardMetadata) -> pa.Schema:
    return SCHEMA.with_metadata({METADATA_KEY: metadata.model_dump_json().encode()})


def check_schema(found: pa.Schema, where: str) -> ShardMetadata:
    """The shard's metadata; `ForeignShardError` names the columns or versions that differ."""
    expected = {field.name: field.type for field in SCHEMA}
    actual = {field.name: field.type for field in found}
    differences = [
        *(f"no column {name!r}" for name in expected if name not in actual),
        *(f"unknown column {name!r}" for name in actual if name not in expected),
        *(
            f"column {name!r} is {actual[name]}, expected {expected[name]}"
            for name in expected
            if name in actual and actual[name] != expected[name]
        ),
    ]
    if differences:
        raise ForeignShardError(f"{where} is not a trajectory shard: {'; '.join(differences)}")
    stored = (found.metadata or {}).get(METADATA_KEY)
    if stored is None:
        raise ForeignShardError(
            f"{where} has no {METADATA_KEY.decode()!r} metadata: not written by dparallel"
        )
    version = json.loads(stored)["schema_version"]
    if version != SCHEMA_VERSION:
        raise ForeignShardError(
            f"{where} has schema version {version}, this code reads {SCHEMA_VERSION}: "
            "record the trajectories again"
        )
    return ShardMetadata.model_validate_json(stored)
