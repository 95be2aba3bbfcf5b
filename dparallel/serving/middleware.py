"""What every request passes before its endpoint: who may ask, by which name, and the count of answers."""

import hashlib
import hmac
import ipaddress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dparallel.serving.errors import RequestError, response
from dparallel.serving.metrics import Metrics

PAGE = "/"
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/requests", "/health", "/metrics")


class KeyRequired:
    """Refuses requests to /v1 without the key; compares digests, in a time that tells nothing about it."""

    def __init__(self, app: ASGIApp, api_key: str):
        self.app, self.expected = app, hashlib.sha256(f"Bearer {api_key}".encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(hashlib.sha256(given).digest(), self.expected):
                message = "give the server's API key as `Authorization: Bearer KEY`"
                error = RequestError(401, message, "invalid_api_key", kind="authentication_error")
                await response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class HostChecked:
    """Refuses requests that name the server otherwise than by an address or as localhost.

    A web page of another site can let its own name lead to this machine (DNS rebinding). To the browser the
    server is then a part of that site, whose scripts could use it and read its answers. The name stays in
    the header `Host`.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if not is_local(host):
                message = (
                    f"Host: {host!r}: without an API key, this server answers only to localhost and to "
                    "addresses: use http://localhost and its port, or set DPARALLEL_API_KEY"
                )
                await response(RequestError(421, message, "unknown_host"))(scope, receive, send)
                return
        await self.app(scope, receive, send)


def is_local(host: str) -> bool:
    """Whether a header `Host` is an address, or a name that always means this machine; also if it is empty,
    which no browser sends."""
    if host.startswith("["):
        name = host[1:].partition("]")[0]
    else:
        name = host.partition(":")[0].lower().removesuffix(".")
    if name == "" or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Counted:
    """Counts answers by endpoint and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        known = (path for path in ENDPOINTS if scope["path"].startswith(path))
        endpoint = PAGE if scope["path"] == PAGE else next(known, "other")

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(endpoint, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counting)
