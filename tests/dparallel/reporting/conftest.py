from pathlib import Path

import pytest

from tests.dparallel.reporting.made import finished_benchmark


@pytest.fixture(scope="module")
def stage(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage; its experiment's folder lies beside the store."""
    hostile = {2: "</pre><script>document.title = 'taken over'</script> & 3 < 4", 3: "x" * 5_000}
    return finished_benchmark(tmp_path_factory.mktemp("runs"), tiny_checkpoint, responses=hostile)
