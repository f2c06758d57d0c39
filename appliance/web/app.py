"""The Quart application: routes, limits, and how an error becomes an answer."""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import ExitStack

import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable
from quart import Request, Response
from quart.utils import encode_headers
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers.request import TrioBody
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as WerkzeugResponse

from appliance.errors import (
    ApplianceError,
    BodyTooLarge,
    BodyTooSlow,
    InvalidRequest,
    MethodNotAllowed,
    Overloaded,
    RouteNotFound,
)
from appliance.log import Log
from appliance.serving.auth import Authenticator
from appliance.serving.bodies import BodyBudget
from appliance.serving.turns import RETRY_AFTER_S
from appliance.web.attestation import AttestationServices, add_attestation_routes
from appliance.web.health import HealthSource, add_health_routes
from appliance.web.openai import CLEANUP, TENANT, InferenceServices, add_inference_routes
from appliance.web.openapi import add_openapi_route
from appliance.web.peers import site_of
from appliance.web.problem import defect, problem
from appliance.web.stream import WRITE_NOW, EventStreamBody, WholeAnswerBody, Write
from appliance.web.well_known import add_well_known_routes


class CountedBody(TrioBody):
    """A request body whose bytes are counted as they arrive, and not kept when there is no room.

    Quart keeps a body as it comes, also while nobody reads it yet.
    """

    def __init__(
        self, budget: BodyBudget, party: str, *, content_length: int | None, max_bytes: int
    ) -> None:
        super().__init__(content_length, max_bytes)
        self._held = budget.hold(party, self._give_way)

    def append(self, data: bytes) -> None:
        """Bytes have arrived; what comes after a refusal or the answer is dropped."""
        if self._must_raise is None and self._held.grow(len(data)):
            super().append(data)

    def set_complete(self) -> None:
        """That was all of it."""
        super().set_complete()
        self._held.finish()

    def release(self) -> None:
        """Nobody needs it any more, nor what may still come. Idempotent."""
        self._held.release()
        self._data.clear()

    def _give_way(self) -> None:
        self._must_raise = Overloaded(
            "the bodies of all requests together are too large now", retry_after_s=RETRY_AFTER_S
        )
        self._data.clear()
        super().set_complete()


class RequestConnection(TrioASGIHTTPConnection):
    """One request. What its handler acquired is released when it is over, however it ended.

    A streamed answer outlives its handler, and a client may go away between the two, when neither
    the handler nor the body is running. So neither owns what must be released; this does.
    """

    app: GatewayApp

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Serve the request; called by Quart with the two ends of the ASGI exchange."""
        with ExitStack() as cleanup:
            self.scope[CLEANUP] = cleanup  # type: ignore[literal-required]
            request = self._create_request_from_scope(send)
            # As Quart-Trio, but for its second task: the answer is made in this one.
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.handle_messages, nursery, request, receive)
                await self.handle_request(nursery, request, send)

    async def _send_response(
        self, send: ASGISendCallable, response: Response | WerkzeugResponse
    ) -> None:
        """Send an answer; a stream writes its body itself, and a whole one hears that it was taken."""
        body = response.response
        if not isinstance(body, EventStreamBody):
            await super()._send_response(send, response)
            if isinstance(body, WholeAnswerBody):
                body.delivered()
            return
        headers = encode_headers(response.headers)
        await send(
            {"type": "http.response.start", "status": response.status_code, "headers": headers}
        )
        async with body:
            await body.relay(self._writer(send))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _writer(self, send: ASGISendCallable) -> Write:
        """The server's own, where it offers one."""
        offered = self.scope["extensions"].get(WRITE_NOW)
        if offered is not None:
            write_now: Write = offered["write"]
            return write_now

        def write(data: bytes) -> Awaitable[None]:
            return send({"type": "http.response.body", "body": data, "more_body": True})

        return write

    def _create_request_from_scope(self, send: ASGISendCallable) -> Request:
        request = super()._create_request_from_scope(send)
        client = self.scope["client"]
        tenant = self.app.authenticator.find(request.headers.get("Authorization"))
        self.scope[TENANT] = tenant  # type: ignore[literal-required]
        # A key's bodies are its own wherever they come from; without one they are their peer's.
        party = tenant.id if tenant else ""
        body = CountedBody(
            self.app.bodies,
            party or (site_of(client[0]) if client else ""),
            content_length=request.content_length,
            max_bytes=self.app.config["MAX_CONTENT_LENGTH"],
        )
        request.body = body
        self.scope[CLEANUP].callback(body.release)  # type: ignore[literal-required]
        return request


class GatewayApp(QuartTrio):
    """Quart with our request connection.

    Attributes:
        bodies: what the bodies of all requests may take together.
        authenticator: knows whose a request is, from its head.
    """

    asgi_http_class = RequestConnection

    def __init__(self, bodies: BodyBudget, authenticator: Authenticator) -> None:
        super().__init__("dcv", static_folder=None)
        self.bodies = bodies
        self.authenticator = authenticator

    async def handle_request(self, request: Request) -> Response | WerkzeugResponse:
        """Have a request answered. Once the answer begins, its body is needed no more."""
        try:
            return await super().handle_request(request)
        finally:
            assert isinstance(request.body, CountedBody)
            request.body.release()


def create_app(
    services: InferenceServices,
    proof: AttestationServices,
    health: HealthSource,
    *,
    csr: bytes,
    storage_key: bytes | None,
    log: Log,
) -> GatewayApp:
    """The application with every route.

    Args:
        csr: PEM of the certificate request for the TLS key.
        storage_key: the TPM's, TPM2B_PUBLIC; None where none is to be shown.
    """
    limits = services.config.limits
    bodies = BodyBudget(limits.max_body_bytes_total)
    services.metrics.gauge(
        "dcv_body_bytes_held", "Bytes of request bodies that are held", lambda: bodies.held
    )
    app = GatewayApp(bodies, services.authenticator)
    app.config["MAX_CONTENT_LENGTH"] = limits.max_body_bytes
    app.config["BODY_TIMEOUT"] = limits.body_s
    # Every wait of ours has its own deadline; Quart's would cut a long answer without a word.
    app.config["RESPONSE_TIMEOUT"] = None
    add_inference_routes(app, services)
    add_health_routes(app, health)
    add_attestation_routes(app, proof)
    add_well_known_routes(app, csr=csr, storage_key=storage_key)
    add_openapi_route(app, services.config)

    async def appliance_error(error: ApplianceError) -> Response:
        return problem(error)

    async def http_error(error: HTTPException) -> Response:
        return problem(_translate(error))

    async def unexpected(error: Exception) -> Response:
        # Its text may quote the request, so only its type is logged.
        log.error("request_defect", error=type(error).__name__, where=_innermost_line(error))
        return problem(defect())

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
