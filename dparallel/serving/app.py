"""The HTTP interface: OpenAI's endpoints over one `Engine`."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from dparallel.serving.answers import Answer, Choice, model_object
from dparallel.serving.bodies import Body, ChatBody, CompletionBody, parse
from dparallel.serving.engine import Busy, Closed, Engine, Served
from dparallel.serving.errors import RequestError, failure, response
from dparallel.serving.jobs import Event, Failed, Finished, Job
from dparallel.serving.limits import Limits
from dparallel.serving.mailbox import Mailbox
from dparallel.serving.metrics import Metrics
from dparallel.serving.middleware import ENDPOINTS, Counted, HostChecked, KeyRequired
from dparallel.serving.page.page import chat_page
from dparallel.serving.requests import job_of, rows_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONGEST_NAME = 128  # characters of a request's own id


@dataclass
class Running:
    """An accepted request: its jobs, and the queue of their events, each with the index of its choice."""

    id: str
    names: tuple[str, ...]
    served: Served
    body: Body
    prompt_tokens: int
    arrived: float
    jobs: list[Job] = field(default_factory=list)
    events: asyncio.Queue[tuple[int, Event]] = field(default_factory=asyncio.Queue)
    first_text: bool = False  # whether the first text was sent


class Api:
    """Answers requests. Prompts are encoded in a thread of its own, so that long ones stop no stream."""

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics, template: str | None = None):
        """
        Args:
            template: chat template instead of those of the tokenizers.
        """
        self.engine, self.limits, self.metrics, self.template = engine, limits, metrics, template
        self.created = int(time.time())
        self.running: dict[str, list[Running]] = {}
        self.encoder = ThreadPoolExecutor(1, "encoder")
        self.mailbox: Mailbox[tuple[int, Event]] | None = None  # of the loop, once it runs

    async def answer(self, request: Request, kind: type[ChatBody] | type[CompletionBody]) -> Response:
        """The answer to a completion request, as one object or as a stream."""
        arrived = time.monotonic()
        body: Body = parse(kind, await _read(request, self.limits))
        served = self._served(body.model)
        encode = partial(rows_of, body, served, self.limits, self.template)
        loop = asyncio.get_running_loop()
        rows = await loop.run_in_executor(self.encoder, encode)
        chat = isinstance(body, ChatBody)
        name = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        own = request.headers.get("x-request-id", "")[:LONGEST_NAME]
        tokens = sum(row.prompt_tokens for row in rows[:: body.n])
        running = Running(name, (name, own) if own else (name,), served, body, tokens, arrived)

        assert self.mailbox is not None
        post, deadline = self.mailbox.post, arrived + self.limits.timeout

        def listener(index: int) -> Callable[[Event], None]:
            return lambda event: post(running.events, (index, event))

        running.jobs = [
            job_of(row, body, served, deadline, listener(index)) for index, row in enumerate(rows)
        ]
        try:
            self.engine.submit(running.jobs)
        except Busy as busy:
            after = {"retry-after": str(busy.retry_after)}
            raise RequestError(429, str(busy), "queue_full", kind="rate_limit_error", headers=after) from busy
        except Closed as closed:
            raise RequestError(
                503, "the server is shutting down", "shutdown", kind="server_error"
            ) from closed
        self.metrics.prompt_tokens.inc(tokens)
        for known in running.names:
            self.running.setdefault(known, []).append(running)
        answer = Answer(name, int(time.time()), served.name, chat, _wants_logprobs(body))
        headers = {"x-request-id": own or name}
        if body.stream:
            return Stream(self._stream(running, answer), partial(self._end, running), headers)
        watch = asyncio.create_task(_wait_for_disconnect(request.receive, partial(self._cancel, running)))
        try:
            return JSONResponse(await self._whole(running, answer), headers=headers)
        finally:
            watch.cancel()
            self._end(running)

    def cancel(self, name: str) -> int:
        """End the requests of an id; returns their number."""
        found = self.running.get(name, [])
        for running in found:
            self._cancel(running)
        return len(found)

    def models(self) -> list[dict[str, Any]]:
        return [model_object(served, self.created, self.template) for served in self.engine.models.values()]

    def _served(self, name: str | None) -> Served:
        models = self.engine.models
        if name is None and len(models) == 1:
            return next(iter(models.values()))
        if name is None or name not in models:
            raise RequestError(
                404,
                f"model={name!r} is not served here; known: {', '.join(models)}",
                "model_not_found",
                "model",
            )
        return models[name]

    def _cancel(self, running: Running) -> None:
        self.engine.cancel(running.jobs)

    def _end(self, running: Running) -> None:
        """Forget a request; what is left of it is cancelled."""
        for known in running.names:
            left = [other for other in self.running.get(known, []) if other is not running]
            self.running.pop(known, None)
            if left:
                self.running[known] = left
        if not all(job.ended for job in running.jobs):
            self._cancel(running)

    def _count(self, running: Running, index: int, event: Event) -> None:
        if isinstance(event, Failed):
            self.metrics.failed.labels(event.reason).inc()
        elif isinstance(event, Finished):
            self.metrics.finished(running.jobs[index], event, time.monotonic())
        if running.body.stream and not running.first_text and not isinstance(event, Failed):
            running.first_text = True
            self.metrics.first_token.observe(time.monotonic() - running.arrived)

    async def _whole(self, running: Running, answer: Answer) -> dict[str, Any]:
        finished: dict[int, Finished] = {}
        while len(finished) < len(running.jobs):
            index, event = await running.events.get()
            self._count(running, index, event)
            if isinstance(event, Failed):
                raise failure(event)
            if isinstance(event, Finished):
                finished[index] = event
        events = [finished[index] for index in range(len(finished))]
        return answer.whole(_choices(running), events, running.prompt_tokens)

    async def _stream(self, running: Running, answer: Answer) -> AsyncIterator[str]:
        body, choices, finished = running.body, _choices(running), list[Finished]()
        canvas = body.stream_mode == "canvas"
        for choice, job in zip(choices, running.jobs, strict=True):
            first = answer.first_chunk(choice, job.decoding if canvas else None)
            if first is not None:
                yield _sent(first)
        while len(finished) < len(choices):
            try:
                async with asyncio.timeout(self.limits.heartbeat):
                    index, event = await running.events.get()
            except TimeoutError:
                yield ": still decoding\n\n"
                continue
            if isinstance(event, Failed):
                self._count(running, index, event)
                yield _sent(failure(event).body)
                return
            if isinstance(event, Finished):
                finished.append(event)
            chunk = answer.chunk(choices[index], event, canvas)
            if choices[index].text.sent or isinstance(event, Finished):
                self._count(running, index, event)
            if chunk is not None:
                yield _sent(chunk)
        if body.stream_options.include_usage:
            yield _sent(answer.usage_chunk(running.prompt_tokens, finished))
        yield "data: [DONE]\n\n"


class Stream(StreamingResponse):
    """Server-sent events. Whatever ends them, also before the first, `end` is called."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None], headers: dict[str, str]):
        unbuffered = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers={**headers, **unbuffered})
        self.end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(_wait_for_disconnect(receive, self.end))
        try:
            await self.stream_response(send)
        finally:
            watch.cancel()
            self.end()


def build_app(
    engine: Engine,
    limits: Limits,
    api_key: str | None = None,
    template: str | None = None,
    loopback: bool = False,
) -> FastAPI:
    """The application. It starts the engine, and closes it at the end.

    Args:
        api_key: what requests to /v1 must give as bearer token.
        template: chat template instead of those of the tokenizers.
        loopback: whether only this machine reaches the server. Without a key, requests must then name it by
            an address or as localhost.
    """
    metrics = Metrics(engine)
    api = Api(engine, limits, metrics, template)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        api.mailbox = Mailbox(asyncio.get_running_loop())
        engine.start()
        yield
        await asyncio.get_running_loop().run_in_executor(None, engine.close)
        api.encoder.shutdown()

    app = FastAPI(
        title="dparallel", version=version("dparallel"), lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.api = api
    if api_key is not None:
        app.add_middleware(KeyRequired, api_key=api_key)
    elif loopback:
        app.add_middleware(HostChecked)
    app.add_middleware(Counted, metrics=metrics)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(Exception, _failed)

    document = chat_page()

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return Response(document.html, headers=document.headers, media_type="text/html")

    @app.post(CHAT, openapi_extra=_schema(ChatBody))
    async def chat(request: Request) -> Response:
        return await api.answer(request, ChatBody)

    @app.post(COMPLETIONS, openapi_extra=_schema(CompletionBody))
    async def completions(request: Request) -> Response:
        return await api.answer(request, CompletionBody)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": api.models()})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(model_object(api._served(name), api.created, template))

    @app.delete("/v1/requests/{name}")
    async def cancel(name: str) -> Response:
        if not api.cancel(name):
            raise RequestError(404, f"no request with the id {name!r} is decoded or waits", "not_found", "id")
        return JSONResponse({"id": name, "object": "request", "cancelled": True})

    @app.get("/health")
    async def health() -> Response:
        state = {"running": engine.running, "waiting": engine.waiting}
        if engine.alive:
            return JSONResponse({"status": "ok", **state})
        return JSONResponse({"status": "the decoding thread has ended", **state}, status_code=503)

    @app.get("/metrics")
    async def measurements() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


async def _read(request: Request, limits: Limits) -> bytes:
    """The body of a request, within the limits of size and time.

    Raises:
        RequestError: it is too large, too slow, or not said to be JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which pages of other sites cannot send from a browser
        raise RequestError(415, f"content-type: {kind!r}: give application/json", "unsupported_media_type")
    too_large = RequestError(
        413, f"the body is larger than {limits.body_bytes} bytes: shorten it", "body_too_large"
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.body_bytes:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        message = f"the body did not arrive within {limits.body_seconds} s"
        raise RequestError(408, message, "body_too_slow") from None
    except ClientDisconnect:
        raise RequestError(400, "the client closed the connection", "disconnected") from None
    return b"".join(parts)


async def _wait_for_disconnect(receive: Receive, then: Callable[[], Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    then()


def _choices(running: Running) -> list[Choice]:
    stops = running.body.stop
    return [Choice(index, running.served, stops) for index in range(len(running.jobs))]


def _wants_logprobs(body: Body) -> bool:
    return body.logprobs if isinstance(body, ChatBody) else body.logprobs is not None


def _sent(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _schema(body: type[ChatBody] | type[CompletionBody]) -> dict[str, Any]:
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return response(error)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; known: {', '.join(ENDPOINTS)}"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    return response(RequestError(error.status_code, message, code, headers=dict(error.headers or {})))


async def _failed(request: Request, error: Exception) -> Response:
    return response(RequestError(500, "the server failed; its log says more", "error", kind="server_error"))
