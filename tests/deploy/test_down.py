"""Commands that `make down` prints to go on with the runs that it stopped."""

from typing import Any

import pytest

from deploy.local.down import command_of

DEFAULTS = {"config": "configs/tiny.yaml", "on_pool": True}


@pytest.mark.parametrize(
    ("name", "tags", "parameters", "expected"),
    [
        ("trajectories/record", ["stage"], DEFAULTS, "prefect deployment run trajectories/record --watch"),
        (
            "trajectories/record",
            ["stage"],
            {**DEFAULTS, "overrides": ["name=long"]},
            "prefect deployment run trajectories/record --watch --param 'overrides=[\"name=long\"]'",
        ),
        (
            "training/train",
            ["stage"],
            {**DEFAULTS, "student": "1"},
            "prefect deployment run training/train --watch --param 'student=\"1\"'",
        ),
        (
            "training/train",
            ["stage"],
            {"config": 'my "own".yaml', "on_pool": True},
            'prefect deployment run training/train --watch --param \'config="my \\"own\\".yaml"\'',
        ),
        (
            "training/train",
            ["stage"],
            {"config": "größe/own.yaml", "on_pool": True},
            "prefect deployment run training/train --watch --param 'config=größe/own.yaml'",
        ),
        ("training/train", ["stage"], {**DEFAULTS, "parent": {"record": "1"}}, None),
        ("shards/record-part", ["dparallel", "part"], {"config": {"settings": {}}, "numbers": [1]}, None),
    ],
)
def test_command_of(name: str, tags: list[str], parameters: dict[str, Any], expected: str | None) -> None:
    deployment = {"full_name": name, "name": name.partition("/")[2], "tags": tags, "parameters": DEFAULTS}
    assert command_of({"parameters": parameters}, deployment) == expected
