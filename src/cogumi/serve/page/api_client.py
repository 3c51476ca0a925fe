"""Asks the HTTP API on behalf of the page: models, streamed answers, ratings."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx

from cogumi.core.errors import RequestError

WAIT = httpx.Timeout(10, read=None)
"""Ten seconds to connect; an answer may take any time, and idle streams send comments."""


class Piece(NamedTuple):
    """A part of a streamed answer; `cogumi` comes with the last one."""

    id: str
    text: str
    cogumi: dict[str, Any] | None


class ApiClient:
    """A client of one server. Every method raises `RequestError` with the server's message if it refuses."""

    def __init__(self, url: str, verify: ssl.SSLContext | bool = True) -> None:
        self._url, self._verify = url, verify

    async def models(self, key: str | None) -> list[dict[str, Any]]:
        """The list of models."""
        async with self._http(key) as http:
            found: list[dict[str, Any]] = (await _sent(http, "GET", "/v1/models"))["data"]
        return found

    async def answer(self, key: str | None, body: dict[str, Any]) -> AsyncGenerator[Piece]:
        """The pieces of a chat answer; closing the generator cancels the request."""
        async with self._http(key) as http, _errors():
            request = http.build_request("POST", "/v1/chat/completions", json=body | {"stream": True})
            response = await http.send(request, stream=True)
            try:
                if response.status_code != 200:
                    raise _refused(await response.aread(), response.status_code)
                async for line in response.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield _piece(line.removeprefix("data: "))
            finally:
                await response.aclose()

    async def rate(self, key: str | None, id: str, right: bool, user: str) -> None:
        """Rate an answer."""
        async with self._http(key) as http:
            await _sent(http, "POST", "/v1/feedback", {"id": id, "right": right, "user": user})

    def _http(self, key: str | None) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(
            base_url=self._url, headers=headers, verify=self._verify, timeout=WAIT, trust_env=False
        )


@asynccontextmanager
async def _errors() -> AsyncIterator[None]:
    """Turns a failed connection into a `RequestError`."""
    try:
        yield
    except httpx.TransportError as error:
        raise RequestError("the server does not answer; is it still running?") from error


async def _sent(http: httpx.AsyncClient, method: str, path: str, body: Any = None) -> Any:
    async with _errors():
        response = await http.request(method, path, json=body)
        if response.is_error:
            raise _refused(response.content, response.status_code)
        return response.json() if response.content else None


def _refused(content: bytes, status: int) -> RequestError:
    """The message of OpenAI's error object, in its response or in the stream."""
    try:
        return RequestError(str(json.loads(content)["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return RequestError(f"the server answered with status {status}")


def _piece(data: str) -> Piece:
    chunk = json.loads(data)
    if "error" in chunk:
        raise _refused(data.encode(), 500)
    delta = chunk["choices"][0]["delta"] if chunk["choices"] else {}
    return Piece(chunk["id"], delta.get("content") or delta.get("refusal") or "", chunk.get("cogumi"))
