"""Every test runs in its own folder, independent of files around the clone and of the shell's environment.

Tests do not use the network, and a single thread, since two would compete on small machines.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTSIDE = ("PREFECT_", "MLFLOW_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DPARALLEL_", "LC_", "LANG")
HOME = Path(tempfile.mkdtemp(prefix="dparallel-tests-"))  # home of this test process
INSIDE = {
    "LC_ALL": "C.UTF-8",
    "PYTHONPATH": str(ROOT),  # child processes run the code of this clone from any working folder
    "OMP_NUM_THREADS": "1",
    "DPARALLEL_CACHE": str(HOME / "cache"),
    "HF_HOME": str(HOME / "huggingface"),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "PREFECT_HOME": str(HOME / "prefect"),
    "PREFECT_PROFILES_PATH": str(HOME / "prefect" / "profiles.toml"),  # not the servers of `make up`
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
for variable in [name for name in os.environ if name.startswith(OUTSIDE)]:
    del os.environ[variable]
os.environ.update(INSIDE)  # before any library reads the environment

import hypothesis
import pytest
import torch

from dparallel.evaluation import plots
from dparallel.models.backbone import DiffusionConfig, DiffusionTransformer
from dparallel.models.checkpoints import load_model, save_model
from dparallel.tiny.tokenizer import build_tokenizer

hypothesis.configuration.set_hypothesis_home_dir(HOME / "hypothesis")
for profile, examples in {"local": 8, "ci": 20}.items():
    hypothesis.settings.register_profile(profile, max_examples=examples, deadline=None, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "local"))

GOLDEN = Path(__file__).parent / "golden"
# The configs that train a teacher; the others beside them are experiments.
TEACHERS = [
    path
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    if "\nout: " in path.read_text(encoding="utf-8")
]


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests get the time that compilers and servers take on a busy machine; others need a GPU."""
    without_gpu = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without_gpu)
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(scope="session", autouse=True)
def away_from_the_clone() -> Iterator[None]:
    """Fixtures of modules and sessions also run outside the clone."""
    started = Path.cwd()
    folder = HOME / "cwd"
    folder.mkdir()
    os.chdir(folder)
    yield
    assert not list(folder.iterdir()), "a fixture of a module or a session writes into the working folder"
    os.chdir(started)
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def coarse_pictures() -> Iterator[None]:
    """Drawing takes longer than what the pictures of small models show."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "DPI", 20)
        yield


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's working folder is its `tmp_path`."""
    monkeypatch.chdir(tmp_path)


def random_model(seed: int = 0, **shape) -> DiffusionTransformer:
    """A small random model with predictions far from uniform, so that rules have to choose."""
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "mask_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = DiffusionTransformer(DiffusionConfig(**{**defaults, "initializer_range": 0.3, **shape}))
    return model.eval()


@pytest.fixture(scope="session")
def tiny_model() -> DiffusionTransformer:
    return random_model()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model of the coins vocabulary with its tokenizer, in our own format."""
    folder = tmp_path_factory.mktemp("tiny_checkpoint")
    save_model(random_model(), folder, tokenizer=build_tokenizer())
    return folder


@pytest.fixture(scope="session")
def llada_tiny() -> DiffusionTransformer:
    return load_model(GOLDEN / "llada_tiny", device="cpu")
