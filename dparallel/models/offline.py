"""Without a network, the Hub's cache is used at once, instead of after retries that take half a minute."""

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

REMEDY = (
    "the Hub cannot be reached from here (HF_HOME names another cache, HF_HUB_OFFLINE=1 asks for no network)"
)


@contextmanager
def cache_if_offline() -> Iterator[bool]:
    """Inside, the Hub's client takes the cache alone if the Hub has no address; yields whether that is so."""
    offline = constants.HF_HUB_OFFLINE or not _has_address()
    modules = [(constants, "HF_HUB_OFFLINE")]
    if "datasets.config" in sys.modules:
        modules.append((sys.modules["datasets.config"], "HF_HUB_OFFLINE"))
    before = [(module, name, getattr(module, name)) for module, name in modules]
    try:
        for module, name, was in before:
            setattr(module, name, was or offline)
        yield offline
    finally:
        for module, name, was in before:
            setattr(module, name, was)


def _has_address() -> bool:
    """Whether the name of the Hub is known; a proxy looks it up itself."""
    if {"all", "http", "https"} & getproxies().keys():
        return True
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(hub.hostname, hub.port or 443)
    except OSError:
        return False
    return True
