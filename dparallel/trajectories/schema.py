"""The Parquet schema of a trajectory shard: one row per decoded prompt.

`response_ids`, `commit_step` and `confidence` have one entry per response position (G); the input of forward
pass s was `where(commit_step < s, response_ids, mask)`. Of a recording in the mode `revising`, `commit_step`
is the forward pass that last changed the token: that canvas holds the tokens that were final by then, and
masks in place of tokens that were still to change. Of imported responses `confidence` is null, and of those
without steps `commit_step` and `nfe` too. A recording with `trajectories.privileged` has a further column,
`teacher_prompt_ids`: the prompt with the reference answer.
"""

import json
from collections.abc import Collection

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
        ("commit_step", pa.list_(pa.int16())),  # the last change of the token
        ("confidence", pa.list_(pa.float32())),  # probability at that step
        ("response", pa.string()),
        ("reference", pa.string()),  # null if unknown
        ("correct", pa.bool_()),  # null if unknown
        ("nfe", pa.int32()),
        ("num_tokens", pa.int32()),  # including the first end token
        ("seed", pa.int64()),  # null if tokens were not sampled
    ]
)
TEACHER_PROMPT = "teacher_prompt_ids"
OPTIONAL = pa.schema([(TEACHER_PROMPT, pa.list_(pa.int32()))])  # with `trajectories.privileged`
METADATA_KEY = b"dparallel.trajectories"


class ForeignShardError(UserError):
    """A Parquet file is not a trajectory shard of this version; the message names the difference."""


class ShardMetadata(BaseModel):
    """Origin of a shard, stored in its Parquet metadata.

    Attributes:
        teacher, tokenizer: fingerprints.
        recording: digest of what determines a response to given prompt ids: teacher, tokenizer, decoding,
            stop texts and the decoding code. None in shards of earlier versions.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    teacher: str
    tokenizer: str
    decoding: DecodingConfig
    recording: str | None = None


def with_metadata(metadata: ShardMetadata, columns: Collection[str] = ()) -> pa.Schema:
    """The schema of a shard with `metadata`, and with those of the optional columns that `columns` has."""
    schema = SCHEMA
    for field in OPTIONAL:
        schema = schema.append(field) if field.name in columns else schema
    return schema.with_metadata({METADATA_KEY: metadata.model_dump_json().encode()})


def check_schema(found: pa.Schema, where: str) -> ShardMetadata:
    """Metadata of a shard; ForeignShardError names columns or versions that differ from this schema."""
    actual = {field.name: field.type for field in found}
    expected = {field.name: field.type for field in SCHEMA}
    expected |= {field.name: field.type for field in OPTIONAL if field.name in actual}
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
