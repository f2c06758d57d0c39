"""The Quart application: routes, limits, and how an error becomes an answer."""

from __future__ import annotations

from contextlib import ExitStack

from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable
from quart import Response
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from werkzeug.exceptions import HTTPException

from appliance.errors import (
    ApplianceError,
    BodyTooLarge,
    BodyTooSlow,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    RouteNotFound,
)
from appliance.log import Log
from appliance.web.health import HealthSource, add_health_routes
from appliance.web.openai import CLEANUP, InferenceServices, add_inference_routes
from appliance.web.openapi import add_openapi_route
from appliance.web.problem import problem
from appliance.web.well_known import add_well_known_routes


class RequestConnection(TrioASGIHTTPConnection):
    """One request. What its handler acquired is released when it is over, however it ended.

    A streamed answer outlives its handler, and a client may go away between the two, when neither
    the handler nor the body is running. So neither owns what must be released; this does.
    """

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Serve the request; called by Quart with the two ends of the ASGI exchange."""
        with ExitStack() as cleanup:
            self.scope[CLEANUP] = cleanup  # type: ignore[literal-required]
            await super().__call__(receive, send)


class GatewayApp(QuartTrio):
    """Quart with our request connection."""

    asgi_http_class = RequestConnection


def create_app(
    services: InferenceServices, health: HealthSource, *, csr: bytes, log: Log
) -> GatewayApp:
    """The application with every route.

    Args:
        csr: PEM of the certificate request for the TLS key.
    """
    limits = services.config.limits
    app = GatewayApp("dcv", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = limits.max_body_bytes
    app.config["BODY_TIMEOUT"] = limits.body_s
    # Every wait of ours has its own deadline; Quart's would cut a long answer without a word.
    app.config["RESPONSE_TIMEOUT"] = None
    add_inference_routes(app, services)
    add_health_routes(app, health)
    add_well_known_routes(app, csr=csr)
    add_openapi_route(app, services.config)

    async def appliance_error(error: ApplianceError) -> Response:
        return problem(error)

    async def http_error(error: HTTPException) -> Response:
        return problem(_translate(error))

    async def unexpected(error: Exception) -> Response:
        # A defect. Its text may quote the request, so only its type is told and logged.
        log.error("request_defect", error=type(error).__name__, where=_innermost_line(error))
        return problem(InternalError("the appliance failed on this request"))

    app.register_error_handler(ApplianceError, appliance_error)
    app.register_error_handler(HTTPException, http_error)
    app.register_error_handler(Exception, unexpected)
    return app


def _translate(error: HTTPException) -> ApplianceError:
    """Werkzeug's and Quart's own errors in our terms."""
    match error.code:
        case 404:
            return RouteNotFound("there is nothing at this path")
        case 405:
            return MethodNotAllowed("this path does not take this method")
        case 408:
            return BodyTooSlow("the request body did not arrive in time")
        case 413:
            return BodyTooLarge("the request body is too large")
        case _:
            return InvalidRequest("the request is not one this service understands")


def _innermost_line(error: BaseException) -> str:
    """File name and line where an exception was raised: code, never data."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return ""
    return f"{traceback.tb_frame.f_code.co_name}:{traceback.tb_lineno}"
