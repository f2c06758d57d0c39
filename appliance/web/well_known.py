"""`/.well-known/dcv/…`: public facts about this appliance, without an API key."""

from __future__ import annotations

from quart import Response
from quart_trio import QuartTrio


def add_well_known_routes(app: QuartTrio, *, csr: bytes) -> None:
    """`/.well-known/dcv/csr`: the certificate request for the TLS key of this boot, as PEM.

    PEM is what authorities and `openssl` take, and plain text is what PEM is (RFC 7468 section 7
    has its form). The registered `application/pkcs10` stands for the DER bytes (RFC 5967; EST sends
    it as their bare base64, RFC 7030 section 4.2.1), and `application/x-pem-file` for nothing that
    was ever registered (RFC 6648).
    """

    async def request() -> Response:
        return Response(
            csr,
            content_type="text/plain; charset=us-ascii",
            headers={"Cache-Control": "no-store"},  # another boot has another key
        )

    app.add_url_rule("/.well-known/dcv/csr", "well_known_csr", request, methods=["GET"])
