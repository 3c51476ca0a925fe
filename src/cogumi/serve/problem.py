"""Refusals as an OpenAI client sees them: a true status, OpenAI's body, and whether asking again can help."""

from __future__ import annotations

from typing import Any

from cogumi.core.errors import BusyError, ContextError, RequestError


class Problem(Exception):
    """A refusal as the client sees it: HTTP `status` and the body's message, type, code and param."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body every OpenAI client understands."""
        kind = {429: "rate_limit_error", 503: "server_error", 500: "server_error"}
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
        """What tells a client whether asking again can help."""
        if not self.retry:
            return {"x-should-retry": "false"}
        return {"retry-after": "1"} if self.status in (429, 503) else {}


def problem_of(error: RequestError) -> Problem:
    """The refusal that stands for an engine's error."""
    if isinstance(error, ContextError):
        return Problem(400, str(error), code="context_length_exceeded")
    if isinstance(error, BusyError):
        return Problem(429, str(error), code="busy", retry=True)
    return Problem(400, str(error))


def internal_error() -> Problem:
    """The refusal that stands for a defect of ours; its traceback goes to the log only."""
    return Problem(500, "internal error; the server's log has the details", code="internal_error", retry=True)
