"""What an Azure confidential VM shows, made under a test AMD root: HCL report, quote, and the
host's metadata service.

The paravisor's part is played here; hardware report and certificates come from `amd_evidence`,
the vTPM is a software TPM or a key of this process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import trio
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from appliance.rats.model import AmdRoots, Anchors
from appliance.wire.evidence import CpuEvidence
from tests.fakes.amd_evidence import Guest, rsa_key
from tests.fakes.authority import pem

REPORT_DATA = 0x50
NV_BYTES = 2600
USED_PCRS = tuple(range(24))


def runtime_claims(
    key: rsa.RSAPublicKey,
    *,
    secure_boot: bool | None = True,
    user_data: bytes = bytes(64),
    with_endorsement_key: bool = False,
) -> bytes:
    """The paravisor's JSON."""
    keys = [jwk("HCLAkPub", "sign", key)]
    if with_endorsement_key:
        keys.append(jwk("HCLEkPub", "encrypt", rsa_key("test EK").public_key()))
    configuration: dict[str, object] = {"console-enabled": True, "tpm-enabled": True}
    if secure_boot is not None:
        configuration["secure-boot"] = secure_boot
    document = {
        "keys": keys,
        "vm-configuration": configuration,
        "user-data": user_data.hex().upper(),
    }
    return json.dumps(document, separators=(",", ":")).encode()


def jwk(kid: str, operation: str, key: rsa.RSAPublicKey) -> dict[str, object]:
    numbers = key.public_numbers()
    return {
        "kid": kid,
        "key_ops": [operation],
        "kty": "RSA",
        "e": base64url(numbers.e.to_bytes(3)),
        "n": base64url(numbers.n.to_bytes(key.key_size // 8)),
    }


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def hcl_report(
    hardware: bytes,
    claims: bytes,
    *,
    version: int = 2,
    report_type: int = 2,
    hash_type: int = 1,
    length: int = 0,
) -> bytes:
    """The NV index; `length` pads it with zeros."""
    data = struct.pack("<IIIII", 20 + len(claims), 1, report_type, hash_type, len(claims)) + claims
    size = 32 + 1184 + len(data)
    head = b"HCLA" + struct.pack("<IIII", version, size, 2, 0) + bytes(12)
    return (head + hardware.ljust(1184, b"\0") + data).ljust(length, b"\0")


def quote_message(
    extra_data: bytes, pcrs: dict[int, bytes], *, digest: str = "sha256", bank: int = 11
) -> bytes:
    """A TPMS_ATTEST over these PCRs."""
    select = sum(1 << pcr for pcr in pcrs).to_bytes(4, "little").removesuffix(b"\0")
    values = b"".join(pcrs[pcr] for pcr in sorted(pcrs))
    pcr_digest = hashlib.new(digest, values).digest()
    signer = b"\x00\x0b" + bytes(32)
    return b"".join(
        (
            bytes.fromhex("ff5443478018"),
            struct.pack(">H", len(signer)) + signer,
            struct.pack(">H", len(extra_data)) + extra_data,
            struct.pack(">QIIB", 123456, 7, 1, 1),
            struct.pack(">Q", 0x2020031200120003),
            struct.pack(">IHB", 1, bank, len(select)) + select,
            struct.pack(">H", len(pcr_digest)) + pcr_digest,
        )
    )


@dataclass(frozen=True)
class AzureGuest:
    """One VM: every part of its evidence, each replaceable."""

    extra_data: bytes = b"n" * 32
    key: str = "test AK"
    pcrs: dict[int, bytes] = field(default_factory=lambda: {pcr: bytes(32) for pcr in USED_PCRS})
    secure_boot: bool | None = True
    hash_type: int = 1
    version: int = 2
    guest: Guest = field(default_factory=Guest)

    @property
    def anchors(self) -> Anchors:
        roots: AmdRoots = self.guest.roots
        return Anchors(amd=(roots,))

    def evidence(self, **parts: bytes) -> CpuEvidence:
        private = rsa_key(self.key)
        claims = runtime_claims(
            private.public_key(), secure_boot=self.secure_boot, with_endorsement_key=True
        )
        digest = {1: hashlib.sha256, 2: hashlib.sha384, 3: hashlib.sha512}[self.hash_type]
        bound = digest(claims).digest().ljust(64, b"\0")
        hardware = self.guest.but(report={**self.guest.report, REPORT_DATA: bound}).raw_report()
        message = quote_message(self.extra_data, self.pcrs)
        made = {
            "hcl_report": hcl_report(
                hardware, claims, version=self.version, hash_type=self.hash_type, length=NV_BYTES
            ),
            "quote": message,
            "signature": private.sign(message, padding.PKCS1v15(), hashes.SHA256()),
            "pcrs": b"".join(self.pcrs[pcr] for pcr in sorted(self.pcrs)),
        }
        return CpuEvidence("azure_vtpm", made | parts, {"vek": self.guest.vek()})


Answer = Callable[[bytes, bytes], tuple[int, bytes]]
"""From the request line and the body to a status and a body."""


def certification(guest: Guest) -> bytes:
    """What `/metadata/THIM/amd/certification` answers on such a machine."""
    body = base64.encodebytes(guest.vek()).decode()
    vcek = f"-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n"
    chain = pem(guest.roots.ask, guest.roots.ark).decode()
    document = {
        "vcekCert": vcek,
        "tcbm": "DB18000000000004",
        "certificateChain": chain,
        "cacheControl": "86400",
    }
    return json.dumps(document).encode()


async def serve_imds(
    answer: Answer, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
) -> None:
    """A metadata service on loopback, until cancelled; started with its URL.

    Like the real one it refuses a question without the header `Metadata: true`.
    """

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            data = b""
            while b"\r\n\r\n" not in data:
                chunk = await stream.receive_some(65536)
                if not chunk:
                    return
                data += chunk
            head, _, body = data.partition(b"\r\n\r\n")
            line, *lines = head.split(b"\r\n")
            headers = {
                name.strip().lower(): value.strip()
                for name, _, value in (one.partition(b":") for one in lines)
            }
            wanted = int(headers.get(b"content-length", b"0"))
            while len(body) < wanted:
                body += await stream.receive_some(65536)
            status, content = answer(line, body)
            if headers.get(b"metadata") != b"true":
                status, content = 400, b'{"error":"Bad request"}'
            reply = (
                f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
            )
            await stream.send_all(reply.encode() + content)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, handle, listeners)
        task_status.started(f"http://127.0.0.1:{port}")
