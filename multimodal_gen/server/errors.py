"""Errors as HTTP answers in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, and no other shape."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from multimodal_gen.errors import (
    AuthenticationFailed,
    InvalidRange,
    InvalidValue,
    MethodNotAllowed,
    MmgenError,
    NotFound,
    UserError,
)
from multimodal_gen.server.metrics import outcome_of_error

# The OpenAI client gives up on retries when it is asked to wait longer than two minutes.
MAX_RETRY_AFTER_S = 60

# Documents the one error shape, and keeps FastAPI from documenting its own.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "An error; the header x-request-id names the request in the server's log.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": ["message", "type", "param", "code"],
                            "properties": {
                                "message": {"type": "string"},
                                "type": {"type": "string"},
                                "param": {"type": ["string", "null"]},
                                "code": {"type": "string"},
                            },
                        }
                    },
                }
            }
        },
    }
}


def error_body(error: MmgenError) -> dict[str, Any]:
    """The JSON body of an error."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_headers(error: MmgenError) -> dict[str, str]:
    """Headers that tell a client whether and when to send the request again."""
    headers: dict[str, str] = {}
    if error.retryable:
        wait = 1.0 if error.retry_after is None else error.retry_after
        headers["retry-after"] = str(min(max(math.ceil(wait), 1), MAX_RETRY_AFTER_S))
    else:
        # The OpenAI client resends 408, 409, 429 and 5xx by itself unless it is told not to.
        headers["x-should-retry"] = "false"
    if isinstance(error, InvalidRange) and error.size is not None:
        headers["content-range"] = f"bytes */{error.size}"
    if isinstance(error, AuthenticationFailed):
        headers["www-authenticate"] = "Bearer"
    return headers


def error_response(error: MmgenError) -> Response:
    """The whole answer; the guard adds the request id."""
    return JSONResponse(error_body(error), status_code=error.status, headers=error_headers(error))


def internal_error() -> MmgenError:
    """What a client sees of a mistake of ours; the log has the rest."""
    return MmgenError(
        "The server made a mistake. Its log holds the details under this answer's x-request-id; please report them."
    )


def install_handlers(app: FastAPI) -> None:
    """Replace every default handler, so that no answer has FastAPI's `{"detail": …}`."""
    app.add_exception_handler(MmgenError, _ours)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)


async def _ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, MmgenError), type(error)
    request.scope["state"]["exchange"].outcome = outcome_of_error(error)
    return error_response(error)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), type(error)
    response = error_response(_from_status(error.status_code, request.method, request.scope["path"]))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _validation(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), type(error)
    where = error.errors()[0]["loc"][-1]
    return error_response(InvalidValue(f"{str(where)[:64]!r} is not valid.", param=str(where)[:64]))


def _from_status(status: int, method: str, path: str) -> MmgenError:
    if status == 404:
        return NotFound(f"There is nothing at {path[:200]!r}. GET /docs lists what this server answers.")
    if status == 405:
        return MethodNotAllowed(f"{method[:20]!r} is not possible at {path[:200]!r}. GET /docs lists what is.")
    return UserError(f"The request was refused with status {status}.") if status < 500 else internal_error()
