"""Who is asking: API keys, stored hashed, compared in constant time.

A key is 256 random bits, so one SHA-256 protects it as well as any slow hash would: there is
nothing to guess. What leaves this module is a tenant; the key itself goes no further.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass

from appliance.config import ApiKey, Auth
from appliance.errors import Unauthorized

KEY_PREFIX = "dcv_"
"""So that secret scanners and people recognise a key that lies where it should not."""

KEY_BYTES = 32
MAX_HEADER_BYTES = 512
SALT_LABEL = b"dcv/1 cache salt\x00"


@dataclass(frozen=True, slots=True)
class Tenant:
    """One party that shares the engine with others.

    Attributes:
        name: for the operator's eyes; not a secret, not shown to other tenants.
        id: stable and unique: the SHA-256 of the key, or of nothing for the anonymous tenant.
        max_concurrent: generations at once, waiting ones included; None for no bound of its own.
        requests_per_minute: sustained rate; None for no bound of its own.
    """

    name: str
    id: str
    max_concurrent: int | None = None
    requests_per_minute: int | None = None


ANONYMOUS = Tenant(name="anonymous", id="")


class Authenticator:
    """Turns an `Authorization` header into a tenant."""

    def __init__(self, auth: Auth) -> None:
        self._required = auth.mode == "keys"
        self._tenants = [(bytes.fromhex(key.sha256), _tenant(key)) for key in auth.keys]

    def authenticate(self, header: str | None) -> Tenant:
        """The tenant a request belongs to.

        Args:
            header: value of the `Authorization` header, if there was one.

        Raises:
            Unauthorized: a key is required, and none or no known one was sent.
        """
        return known(self.find(header))

    def find(self, header: str | None) -> Tenant | None:
        """The tenant a request belongs to; None where a key is required that was not sent.

        Every stored hash is compared, each in constant time, whether an earlier one matched or
        not: the time taken says neither which key matched nor how much of one.
        """
        if not self._required:
            return ANONYMOUS
        if header is None:
            return None
        presented = hashlib.sha256(_bearer(header)).digest()
        found = None
        for stored, tenant in self._tenants:
            if hmac.compare_digest(stored, presented):
                found = tenant
        return found


def known(tenant: Tenant | None) -> Tenant:
    """The tenant that was found.

    Raises:
        Unauthorized: none was.
    """
    if tenant is None:
        raise Unauthorized("expected a known API key as `Authorization: Bearer …`")
    return tenant


def create_key(random: Callable[[int], bytes]) -> str:
    """A new API key."""
    return KEY_PREFIX + base64.urlsafe_b64encode(random(KEY_BYTES)).rstrip(b"=").decode()


def hash_key(key: str) -> str:
    """What the configuration stores of a key: lowercase hex SHA-256 of its ASCII bytes."""
    return hashlib.sha256(key.encode("ascii")).hexdigest()


def cache_salt(secret: bytes, tenant: Tenant) -> str:
    """The salt under which the engine may share prefixes between one tenant's requests.

    Without one, how fast an answer begins tells a tenant which prefixes others have sent. It is
    an HMAC under a secret of this boot, so it neither repeats after a restart nor tells the id.
    """
    return hmac.new(secret, SALT_LABEL + tenant.id.encode("ascii"), hashlib.sha256).hexdigest()


def _bearer(header: str) -> bytes:
    """The key a header carries; anything else becomes a key that nobody has."""
    scheme, _, key = header[:MAX_HEADER_BYTES].partition(" ")
    return key.strip().encode("utf-8", "replace") if scheme.lower() == "bearer" else b""


def _tenant(key: ApiKey) -> Tenant:
    return Tenant(
        name=key.name,
        id=key.sha256,
        max_concurrent=key.max_concurrent,
        requests_per_minute=key.requests_per_minute,
    )
