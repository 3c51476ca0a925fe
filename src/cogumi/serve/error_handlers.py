"""Maps every error of the application to OpenAI's error body and an HTTP status."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cogumi.core.errors import RequestError
from cogumi.serve.middleware import REQUEST_ID, request_id
from cogumi.serve.problem import Problem, internal_error, problem_of


def add_error_handlers(app: FastAPI) -> None:
    """Register a handler for refusals, engine errors, invalid bodies, HTTP errors and defects."""

    @app.exception_handler(Problem)
    async def refused(_: Request, problem: Problem) -> JSONResponse:
        return problem.response

    @app.exception_handler(RequestError)
    async def engine_refused(_: Request, error: RequestError) -> JSONResponse:
        return problem_of(error).response

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> JSONResponse:
        response = internal_error().response
        response.headers[REQUEST_ID] = request_id(request.scope)  # this handler runs outside all middleware
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            what = f"the body is not valid JSON: {first['ctx']['error']}"
            return Problem(400, what, code="invalid_json").response
        what = first["msg"].removeprefix("Value error, ")
        param = ".".join(str(part) for part in first["loc"] if part != "body") or None
        return Problem(400, f"{param}: {what}" if param else what, param=param).response

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        response = Problem(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response
        response.headers.update(error.headers or {})
        return response
