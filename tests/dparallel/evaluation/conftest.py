from collections.abc import Iterator

import pytest

from dparallel.evaluation import plots


@pytest.fixture(scope="module")
def coarse_pictures() -> Iterator[None]:
    """Pictures take longer than what they show of small models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "DPI", 20)
        yield
