"""`/.well-known/dcv/…`: public facts about this appliance, without an API key."""

from __future__ import annotations

from quart import Response
from quart_trio import QuartTrio

from appliance.errors import RouteNotFound


def add_well_known_routes(app: QuartTrio, *, csr: bytes, storage_key: bytes | None) -> None:
    """`/.well-known/dcv/csr`: the certificate request for the TLS key of this boot, as PEM.

    PEM is what authorities and `openssl` take, and plain text is what PEM is (RFC 7468 section 7
    has its form). The registered `application/pkcs10` stands for the DER bytes (RFC 5967; EST sends
    it as their bare base64, RFC 7030 section 4.2.1), and `application/x-pem-file` for nothing that
    was ever registered (RFC 6648).

    `/.well-known/dcv/storage-key`: the TPM2B_PUBLIC that secrets are sealed to, as `tpm2_readpublic`
    writes it; 404 where there is none.
    """

    async def request() -> Response:
        return Response(
            csr,
            content_type="text/plain; charset=us-ascii",
            headers={"Cache-Control": "no-store"},  # another boot has another key
        )

    async def public_storage_key() -> Response:
        if storage_key is None:
            raise RouteNotFound("this appliance shows no storage key")
        return Response(
            storage_key,
            content_type="application/octet-stream",
            headers={"Cache-Control": "no-store"},
        )

    app.add_url_rule("/.well-known/dcv/csr", "well_known_csr", request, methods=["GET"])
    app.add_url_rule(
        "/.well-known/dcv/storage-key",
        "well_known_storage_key",
        public_storage_key,
        methods=["GET"],
    )
