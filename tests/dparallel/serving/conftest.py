"""Real models, and real servers on free ports of this machine."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest
from fastapi import FastAPI

from dparallel.config.decoding import DecodingConfig
from dparallel.models.checkpoints import load_model, load_tokenizer
from dparallel.serving.app import build_app
from dparallel.serving.engine import Engine, Served
from dparallel.serving.limits import Limits
from dparallel.serving.server import Server, address_of, bound_socket
from dparallel.tiny.tokenizer import build_tokenizer
from tests.conftest import ROOT, random_model

TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
TEACHER = DecodingConfig(gen_length=36, block_length=12, threshold=0.5)
SLOW = DecodingConfig(gen_length=1024, block_length=1024, rule="steps", steps=1024, stop_at_eos=False)


@dataclass
class Running:
    url: str
    engine: Engine
    app: FastAPI
    server: Server

    @contextlib.contextmanager
    def client(self) -> Iterator[httpx.Client]:
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as client:
            yield client


@pytest.fixture(scope="session")
def teacher() -> Served:
    """The embedded teacher; it answers a problem in one or two blocks."""
    path = str(ROOT / "teachers" / "tiny")
    return Served("tiny", load_model(path, device="cpu"), load_tokenizer(path), TEACHER)


@pytest.fixture(scope="session")
def endless() -> Served:
    """A random model that decodes for 1,024 forward passes, unless it is told otherwise."""
    return Served("endless", random_model(max_position_embeddings=2048), build_tokenizer(), SLOW)


@contextlib.contextmanager
def serving(
    *models: Served,
    key: str | None = None,
    template: str | None = TEMPLATE,
    loopback: bool = False,
    **limits,
) -> Iterator[Running]:
    """A server in a thread of this process; at the end it drains."""
    checked = Limits(**limits)
    engine = Engine({served.name: served for served in models}, checked.batch_size, checked.queue)
    app = build_app(engine, checked, key, template, loopback)
    listening, ready = bound_socket("127.0.0.1", 0), threading.Event()
    server = Server(app, checked, ready.set)
    url = address_of(listening)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        assert ready.wait(30)
        yield Running(url, engine, app, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        assert not engine.alive


@pytest.fixture(scope="module")
def server(teacher: Served, endless: Served) -> Iterator[Running]:
    with serving(teacher, endless, batch_size=4, queue=64) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Waits for a condition."""

    def wait(condition: Callable[[], bool]) -> None:
        for _ in range(6000):
            if condition():
                return
            threading.Event().wait(0.01)
        raise AssertionError("the condition did not come true")

    return wait
