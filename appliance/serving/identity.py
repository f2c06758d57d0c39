"""Who this appliance is, this boot: its workload, its GPUs and its keys, under one digest.

Made at stage 5 of the boot from what was measured and checked until then, never changed
afterwards but for the keyset's `not_after`, which is renewed in time with the same keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from appliance import __version__
from appliance.config import Engine, MeasuredConfig, Model
from appliance.serving.image_facts import ImageFacts
from appliance.serving.keys import SigningKey
from appliance.wire.canonical import JsonObject, JsonValue
from appliance.wire.encoding import format_sha256
from appliance.wire.identity import (
    Keyset,
    digest_of,
    instance_document,
    subject_of,
    workload_manifest,
)

ENGINE_NAME = "sglang"
UNSAFE_ENGINE_NAME = "unsafe_command"

TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """A GPU as the instance document names it."""

    scheme: str
    device_cert_sha256: str
    ueid: str | None


@dataclass(frozen=True, slots=True)
class Identity:
    """This appliance's documents and keys.

    Attributes:
        manifest, instance, policy: as they are published and hashed.
        spki_sha256: of the TLS key, 32 bytes.
        workload_digest: W, 32 bytes.
    """

    manifest: JsonObject
    instance: JsonObject
    policy: JsonObject
    image: ImageFacts
    receipt_key: SigningKey
    checkpoint_key: SigningKey
    spki_sha256: bytes
    workload_digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "workload_digest", digest_of(self.manifest))

    @property
    def subject(self) -> str:
        """Of every keyset of this boot."""
        return subject_of(self.workload_digest, digest_of(self.instance))

    @property
    def claims_determinism(self) -> bool:
        """What the manifest, and with it every receipt, says of the engine."""
        engine = self.manifest["engine"]
        assert isinstance(engine, dict)
        return engine["deterministic"] is True

    def keyset(self, *, not_after: int) -> Keyset:
        """The keyset that is valid until `not_after`, Unix seconds."""
        return Keyset(
            subject=self.subject,
            not_after=not_after,
            receipt_keys=(self.receipt_key.public,),
            tls=(self.spki_sha256,),
        )


def create_identity(
    config: MeasuredConfig,
    *,
    settings: JsonObject,
    gpus: list[GpuFacts],
    image: ImageFacts,
    spki_sha256: bytes,
    receipt_key: SigningKey,
    checkpoint_key: SigningKey,
    operator_input_digest: str | None,
) -> Identity:
    """The identity of this boot.

    Args:
        settings: the engine's effective settings, as they were handed to it.
        gpus: in the order in which their evidence will be given.
    """
    policy = msgspec.to_builtins(config.policy)
    assert isinstance(policy, dict)
    listed: list[JsonObject] = [
        {"scheme": gpu.scheme, "device_cert_sha256": gpu.device_cert_sha256, "ueid": gpu.ueid}
        for gpu in gpus
    ]
    return Identity(
        manifest=workload_manifest(
            image={
                "version": image.version or __version__,
                "commit": image.commit,
                "roothash": image.roothash,
            },
            model=model_identity(config.model),
            engine=engine_identity(config.engine, settings),
            policy=policy,
        ),
        instance=instance_document(
            gpus=listed,
            checkpoint_key=checkpoint_key.public,
            operator_input_digest=operator_input_digest,
        ),
        policy=policy,
        image=image,
        receipt_key=receipt_key,
        checkpoint_key=checkpoint_key,
        spki_sha256=spki_sha256,
    )


def model_identity(model: Model) -> JsonObject:
    """`model` of the manifest. Its digest covers the name and the SHA-256 of every file."""

    def file_digest(name: str) -> str | None:
        found = model.files.get(name)
        return None if found is None else "sha256:" + found

    files: JsonObject = dict(model.files)
    return {
        "id": model.id,
        "revision": model.revision,
        "digest": format_sha256(digest_of(files)),
        "tokenizer_digest": file_digest(TOKENIZER_FILE),
        "chat_template_digest": file_digest(CHAT_TEMPLATE_FILE),
    }


def engine_identity(engine: Engine, settings: JsonObject) -> JsonObject:
    """`engine` of the manifest.

    `settings_digest` leaves out where the model lies: which model it is stands beside it.
    """
    counted: dict[str, JsonValue] = {
        name: value for name, value in settings.items() if name != "model-path"
    }
    return {
        "name": UNSAFE_ENGINE_NAME if engine.unsafe_command else ENGINE_NAME,
        "version": engine.version,
        "settings_digest": format_sha256(digest_of(counted)),
        "dtype": engine.dtype,
        "deterministic": engine.deterministic and not engine.unsafe_command,
        "random_seed": engine.random_seed,
    }
