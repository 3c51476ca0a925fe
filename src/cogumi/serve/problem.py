"""Errors in OpenAI's format: HTTP status, error body, and whether a retry can help."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from cogumi.core.errors import BusyError, ContextError, RequestError


class Problem(Exception):
    """A refused request: HTTP `status`, and message, type, code and param of the error body.

    `retry`: seconds after which a retry can help; 0 if none can.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry: int = 0,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body in OpenAI's format."""
        kind = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error", 500: "server_error"}
        return {
            "error": {
                "message": self.message,
                "type": kind.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Headers for the client's retry logic."""
        if not self.retry:
            return {"x-should-retry": "false"}
        return {"retry-after": str(self.retry)} if self.status in (429, 503) else {}

    @property
    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def problem_of(error: RequestError) -> Problem:
    """Map an engine's error to a response."""
    if isinstance(error, ContextError):
        return Problem(400, str(error), code="context_length_exceeded")
    if isinstance(error, BusyError):
        return Problem(429, str(error), code="busy", retry=1)
    return Problem(400, str(error))


def internal_error() -> Problem:
    """The response to a defect of the server; the traceback is only logged."""
    return Problem(500, "internal error; the server's log has the details", code="internal_error", retry=1)
