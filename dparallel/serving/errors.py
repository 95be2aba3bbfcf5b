"""Errors of requests, in the form in which OpenAI's API reports them."""

from typing import Any

from fastapi.responses import JSONResponse

from dparallel.serving.jobs import Failed

NO_RETRY = {"x-should-retry": "false"}  # clients retry 408, 409, 429 and all from 500 on otherwise


class RequestError(Exception):
    """A request that is not answered.

    Attributes:
        status: HTTP status.
        kind, code, param: `type`, `code` and `param` of the error object; `param` is the field at fault.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.kind = status, message, code, param, kind
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


STATUS = {"cancelled": 409, "timeout": 504, "memory": 503, "weights": 500, "error": 500, "shutdown": 503}


def failure(failed: Failed) -> RequestError:
    """A response that was not finished."""
    return RequestError(
        STATUS[failed.reason], failed.message, failed.reason, kind="server_error", headers=NO_RETRY
    )


def response(error: RequestError) -> JSONResponse:
    """The answer to a request that is not answered."""
    return JSONResponse(error.body, error.status, headers=error.headers)
