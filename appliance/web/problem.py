"""An error as an HTTP answer, from what `appliance.errors` declares about it and nothing else."""

from __future__ import annotations

from quart import Response

from appliance.errors import ApplianceError, AttestationFailed, InternalError, Unauthorized
from appliance.wire.answers import error_object
from appliance.wire.canonical import JsonObject, canonical_json


def error_body(error: ApplianceError) -> JsonObject:
    """OpenAI's error object for an error of ours."""
    return error_object(error.message, type=error.type, param=error.param, code=error.code)


def defect() -> InternalError:
    """What is told of an exception that is none of our errors: nothing of it, its text may quote
    the request."""
    return InternalError("the appliance failed on this request")


def problem(error: ApplianceError) -> Response:
    """The HTTP answer for an error."""
    response = Response(
        canonical_json(error_body(error)),
        status=error.http_status,
        content_type="application/json",
    )
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, AttestationFailed):
        # The openai package retries a 503 by itself; the next attempt would fare no better.
        response.headers["x-should-retry"] = "false"
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"  # RFC 9110 section 11.6.1
    return response
