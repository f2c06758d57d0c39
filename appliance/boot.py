"""The boot, in numbered stages. Nothing listens on the public port before stage 10.

    1 configuration   the settings make sense together; the engine's command can be made
    2 keys            TLS, receipt and checkpoint keys are born; the TLS certificate is written for
                      clients; the authorities of client certificates are read
    3 attester        the collector answers; what the configuration requires is there
    4 GPU evidence    over a random nonce, appraised by our verifier, and by NVIDIA's where asked
    5 model           every weight file is the one the configuration names; with that the workload
                      manifest, the instance document and the keyset are complete
    6 GPU ready       the GPUs may take work
    7 engine          started, ready, reachable from loopback only
    8 self-test       one seeded request, asked twice, has one answer; where nothing is claimed
                      about determinism, it is asked once, to warm up
    9 self-check      the appliance appraises its own report with the relying party's code
    10 listener       opened by `run`, which then says READY=1

Each stage logs one line, shows in the lifecycle, has a deadline, and fails as a BootError that
names it.
"""

from __future__ import annotations

import datetime
import resource
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from appliance.attester.client import Attester
from appliance.config import Attestation, Limits, MeasuredConfig
from appliance.credentials import Secret, VendorKeys
from appliance.endorsements.anchors import load_anchors, load_simulated_anchors
from appliance.endorsements.nvidia_sdk import consult
from appliance.engine.command import EngineCommand, EngineKeys, effective_settings, engine_command
from appliance.engine.process import RunningEngine, available_threads, choose_port
from appliance.engine.weights import verify_model_files
from appliance.errors import (
    ApplianceError,
    AttesterUnavailable,
    BootError,
    CertificateRefused,
    ConfigError,
    Contraindicated,
    EngineStartFailed,
    Malformed,
)
from appliance.log import Log
from appliance.rats.gpus import GpuStatement, summary
from appliance.rats.model import Anchors
from appliance.rats.result import AttestationResult
from appliance.serving.certificates import parse_client_authorities, read_certificates
from appliance.serving.epochs import Epoch, Epochs
from appliance.serving.identity import GpuFacts, Identity, create_identity
from appliance.serving.image_facts import ImageFacts, read_image_facts
from appliance.serving.keys import TlsIdentity, create_signing_key, create_tls_identity
from appliance.serving.lifecycle import Lifecycle
from appliance.serving.own_evidence import OwnEvidence
from appliance.serving.reattestation import Reattestation
from appliance.serving.reports import Reports
from appliance.serving.self_test import self_test, warm_up
from appliance.serving.tokenizing import ModelTokenizer, load_tokenizer, vocabulary_size
from appliance.wire.encoding import format_sha256
from appliance.wire.evidence import GpuEvidence
from appliance.wire.sealed import parse_storage_key

QUICK_S = 60.0
"""For a stage that only computes."""

SLACK_S = 60.0
"""Beyond a stage's own deadline, so that its own error comes first."""

OWN_DESCRIPTORS = 128
"""Listeners, database, collector, vendors, and room."""

KEY_BYTES = 32
NONCE_BYTES = 32
MAX_STORAGE_KEY_BYTES = 256

QUESTIONS_PER_GPU = 12
"""To vendors, at stage 4: two manifests, and whether each of some nine certificates still holds."""

EVIDENCE_STAGES = (3, 4, 6, 9)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Booted:
    """What the stages before the listener made."""

    tls: TlsIdentity
    tls_context: ssl.SSLContext
    own: OwnEvidence
    identity: Identity
    epochs: Epochs
    reports: Reports
    reattestation: Reattestation
    engine: RunningEngine
    tokenizer: ModelTokenizer | None
    vocabulary_size: int | None
    storage_key: bytes | None


class Owner(Protocol):
    """Who owns what the boot starts: tasks of a nursery of the caller's, which ends them."""

    async def start_engine(self, command: EngineCommand, keys: EngineKeys) -> RunningEngine:
        """Start supervision; returns once the engine is ready."""
        ...

    async def start_attester(self, anchors: Anchors) -> tuple[Attester, OwnEvidence]:
        """Connect to the collector, and set up what works with it."""
        ...

    def start_epochs(self, epochs: Epochs) -> None:
        """Have epochs formed from now on."""
        ...

    def gpus_ready(self) -> None:
        """The GPUs may take work from now on: they are to be told when that ends."""
        ...

    def publish_tls(self, identity: TlsIdentity) -> None:
        """The TLS key is born: an operator can have a certificate made while the model loads."""
        ...

    def publish_report(self, keyset_digest: bytes, report: bytes) -> None:
        """A null-form report was made: it is kept as long as receipts cite its keyset."""
        ...

    def withdraw(self, error: ApplianceError) -> None:
        """The appliance must not go on serving."""
        ...


async def boot(
    config: MeasuredConfig,
    *,
    owner: Owner,
    operator_input_digest: str | None,
    vendor_keys: VendorKeys,
    lifecycle: Lifecycle,
    log: Log,
    now: Callable[[], float],
    random: Callable[[int], bytes],
) -> Booted:
    """Run stages 1 to 9.

    Args:
        now: Unix seconds. random: so many random bytes.

    Raises:
        BootError: the first stage that failed, and why.
    """
    attestation = config.attestation

    async def stage(
        number: int, name: str, deadline_s: float, step: Callable[[], Awaitable[T]]
    ) -> T:
        return await run_stage(
            number, name, step, deadline_s=deadline_s, lifecycle=lifecycle, log=log
        )

    # 1. Configuration. It was decoded before we were called; this makes what follows from it.
    keys = EngineKeys(api=random(KEY_BYTES).hex(), admin=random(KEY_BYTES).hex())
    command, anchors, image, storage_key = await stage(
        1, "configuration", QUICK_S, partial(_prepare, config, keys)
    )
    # 2. Keys, one role each.
    tls, tls_context = await stage(2, "keys", QUICK_S, partial(_tls, config, now))
    receipt_key, checkpoint_key = create_signing_key("receipt"), create_signing_key("checkpoint")
    owner.publish_tls(tls)
    # 3. The collector, and what must be there. It is connected to before the engine exists.
    attester, own = await stage(
        3,
        "attester",
        QUICK_S + 2 * attestation.collect_s + 2 * attestation.endorsement_s,
        partial(_attester, attestation, owner, anchors, log),
    )
    # 4. GPU evidence. The keyset does not exist yet, so its nonce is random.
    gpus = await stage(
        4,
        "GPU evidence",
        _gpu_deadline_s(attestation),
        partial(_gpus, attestation, own, random(NONCE_BYTES), vendor_keys.nvidia, log),
    )
    # 5. Weights. In the image dm-verity vouches for the volume; here every file is hashed.
    tokenizer = await stage(
        5, "model", config.engine.ready_deadline_s, partial(_model, config, lifecycle)
    )
    identity = create_identity(
        config,
        settings=effective_settings(config.engine, config.model),
        gpus=[_facts(one) for one in gpus],
        image=image,
        spki_sha256=bytes.fromhex(tls.spki_sha256),
        receipt_key=receipt_key,
        checkpoint_key=checkpoint_key,
        operator_input_digest=operator_input_digest,
    )
    epochs, reports, reattestation = _evidence_services(
        attestation, own, identity, owner, random=random, now=now, log=log
    )
    owner.start_epochs(epochs)
    # 6. The GPUs may take work: nothing reaches one that was not appraised.
    await stage(6, "GPU ready", QUICK_S, partial(_gpu_ready, attestation, attester, owner, log))
    # 7. Engine.
    engine = await stage(
        7,
        "engine",
        config.engine.ready_deadline_s + SLACK_S,
        partial(owner.start_engine, command, keys),
    )
    # 8. What receipts will say of the engine, tried.
    await stage(
        8,
        "self-test",
        config.engine.ready_deadline_s,
        partial(_self_test, config, identity, engine, log),
    )
    # 9. What a relying party will be told, appraised as one would. There are no reference values
    #    for ourselves here, so a warning passes.
    result = await stage(
        9,
        "self-check",
        2 * attestation.collect_s + QUICK_S,
        partial(_self_check, reattestation, reports),
    )
    log.info(
        "attested",
        verdict=result.verdict.value,
        keyset=reports.keyset_digest.hex(),
        findings=[str(one) for one in result.all_findings()],
    )
    return Booted(
        tls=tls,
        tls_context=tls_context,
        own=own,
        identity=identity,
        epochs=epochs,
        reports=reports,
        reattestation=reattestation,
        engine=engine,
        tokenizer=tokenizer,
        vocabulary_size=await trio.to_thread.run_sync(vocabulary_size, Path(config.model.path)),
        storage_key=storage_key,
    )


async def run_stage(
    number: int,
    name: str,
    step: Callable[[], Awaitable[T]],
    *,
    deadline_s: float,
    lifecycle: Lifecycle,
    log: Log,
) -> T:
    """Run one stage: announce it, bound it, log how long it took.

    Raises:
        BootError: it failed, or did not end within its deadline.
    """
    lifecycle.begin_stage(number, name)
    started = trio.current_time()
    try:
        with trio.fail_after(deadline_s):
            result = await step()
    except trio.TooSlowError:
        failed = AttesterUnavailable if number in EVIDENCE_STAGES else EngineStartFailed
        cause = failed(f"expected it to end within {deadline_s:g} s")
        raise BootError(number, name, cause) from None
    except ApplianceError as error:
        raise BootError(number, name, error) from error
    log.info("boot_stage", stage=number, name=name, s=round(trio.current_time() - started, 3))
    return result


async def _prepare(
    config: MeasuredConfig, keys: EngineKeys
) -> tuple[EngineCommand, Anchors, ImageFacts, bytes | None]:
    reserve_descriptors(config.limits)
    command = engine_command(
        config.engine,
        config.model,
        port=choose_port(),
        keys=keys,
        threads=available_threads(),
    )
    digest_file = config.attestation.image_digest_file
    image = read_image_facts(Path(digest_file), root=Path("/")) if digest_file else ImageFacts()
    storage_key = _storage_key(config.attestation.storage_key_file)
    return command, _anchors(config.attestation), image, storage_key


def _storage_key(path: str) -> bytes | None:
    """The TPM's, for those who seal secrets to it; None where there is none, which harms nobody."""
    if not path:
        return None
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_STORAGE_KEY_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"[attestation] storage_key_file: {error.strerror}") from error
    try:
        parse_storage_key(data)
    except Malformed as error:
        raise ConfigError(f"[attestation] storage_key_file: {error.message}") from error
    return data


def reserve_descriptors(limits: Limits) -> None:
    """Let this process open as many files as its limits on clients may come to.

    Else whoever may open connections could take the descriptors that the engine is asked with.

    Raises:
        ConfigError: it may not.
    """
    # A connection each; one to the engine for every generation, and one more that aborts it.
    needed = limits.max_connections + 2 * limits.max_concurrent + OWN_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"[limits] max_connections and max_concurrent: they need {needed} open files, this "
            f"process may have {hard} (ulimit -Hn, LimitNOFILE=)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _anchors(attestation: Attestation) -> Anchors:
    """The pinned roots; the published test roots only where the configuration asks for them."""
    tpm_roots = b""
    if attestation.tpm_roots_file:
        try:
            tpm_roots = Path(attestation.tpm_roots_file).read_bytes()
        except OSError as error:
            raise ConfigError(f"[attestation] tpm_roots_file: {error.strerror}") from error
    anchors = load_anchors(tpm_roots=tpm_roots)
    if "simulated" in (attestation.cpu, attestation.gpu):
        return load_simulated_anchors(anchors)
    return anchors


async def _tls(
    config: MeasuredConfig, now: Callable[[], float]
) -> tuple[TlsIdentity, ssl.SSLContext]:
    at = datetime.datetime.fromtimestamp(now(), tz=datetime.UTC)
    try:
        identity = create_tls_identity(config.tls.names, now=at)
    except ValueError as error:
        raise ConfigError(f"[tls] names: {error}") from error
    if config.tls.certificate_file:
        write_public_file(Path(config.tls.certificate_file), identity.certificate)
    if not config.tls.client_ca_file:
        return identity, identity.server_context()
    try:
        authorities = parse_client_authorities(read_certificates(Path(config.tls.client_ca_file)))
        return identity, identity.server_context(client_cas=authorities)
    except CertificateRefused as error:
        raise ConfigError(f"[tls] client_ca_file: {error.message}") from error
    except ssl.SSLError as error:
        raise ConfigError(f"[tls] client_ca_file: OpenSSL says {error.reason}") from error


async def _attester(
    attestation: Attestation, owner: Owner, anchors: Anchors, log: Log
) -> tuple[Attester, OwnEvidence]:
    attester, own = await owner.start_attester(anchors)
    # What vendors say about this CPU is fetched here, so that no request waits for it.
    await own.refresh_cpu()
    if attestation.gpu == "unsafe_none":
        log.warning("no_gpu_required")
        return attester, own
    inventory = await _in_time(attestation.collect_s, "the GPUs' inventory", attester.inventory)
    state = inventory.cc_state
    if not state.is_production:
        raise Contraindicated(
            "expected confidential computing on, in production, developer tools off; got "
            f"cc_feature {state.cc_feature}, environment {state.environment}, "
            f"dev_tools_mode {state.dev_tools_mode}"
        )
    log.info(
        "gpus",
        driver=inventory.driver_version,
        gpus=[f"{one.name} {one.vbios_version} UEID {one.ueid}" for one in inventory.gpus],
    )
    return attester, own


async def _gpus(
    attestation: Attestation, own: OwnEvidence, nonce: bytes, service_key: Secret | None, log: Log
) -> tuple[GpuStatement, ...]:
    if attestation.gpu == "unsafe_none":
        log.warning("no_gpu_evidence_required")
        return ()
    # 1. Collected, and the vendors asked about exactly this.
    raw = await _in_time(attestation.collect_s, "GPU evidence", partial(own.gpus, nonce))
    endorsed = await own.refresh_gpus(raw, nonce)
    # 2. Our verdict.
    statements = await own.appraise_gpus(endorsed, nonce)
    result = summary(statements)
    result.require()
    # 3. NVIDIA's, where it is asked.
    if attestation.gpu == "nvidia":
        await consult(attestation, endorsed, nonce, result, log=log, service_key=service_key)
    return statements


def _gpu_deadline_s(attestation: Attestation) -> float:
    """Longer than what it waits for, so that its own error comes first."""
    vendors = attestation.gpu_count * QUESTIONS_PER_GPU * attestation.endorsement_s
    return attestation.collect_s + vendors + attestation.nvidia_sdk_s + QUICK_S


def _facts(statement: GpuStatement) -> GpuFacts:
    claims = statement.claims
    return GpuFacts(claims.scheme, claims.device_certificate_sha256, claims.ueid)


def _evidence_services(
    attestation: Attestation,
    own: OwnEvidence,
    identity: Identity,
    owner: Owner,
    *,
    random: Callable[[int], bytes],
    now: Callable[[], float],
    log: Log,
) -> tuple[Epochs, Reports, Reattestation]:
    async def appraise(gpus: tuple[GpuEvidence, ...], nonce: bytes) -> AttestationResult:
        return summary(await own.appraise_gpus(gpus, nonce))

    async def refresh(epoch: Epoch) -> None:
        await own.refresh_cpu()
        if epoch.gpus:
            await own.refresh_gpus(epoch.gpus, epoch.nonce)

    reports = Reports(
        identity,
        quote=own.quote,
        lifetime_s=attestation.keyset_s,
        now=now,
        publish=owner.publish_report,
    )
    epochs = Epochs(
        collect=own.gpus,
        appraise=appraise,
        keyset_digest=lambda: reports.keyset_digest,
        deadline_s=attestation.collect_s,
        failures=attestation.failures,
        withdraw=owner.withdraw,
        now=now,
        log=log,
    )
    reports.use(epochs)
    reattestation = Reattestation(
        attestation,
        reports,
        epochs,
        appraise=own.appraise_report,
        refresh=refresh,
        withdraw=owner.withdraw,
        random_bytes=random,
        now=now,
        log=log,
    )
    return epochs, reports, reattestation


async def _gpu_ready(attestation: Attestation, attester: Attester, owner: Owner, log: Log) -> None:
    if attestation.gpu == "unsafe_none":
        log.warning("no_gpu_to_make_ready")
        return
    owner.gpus_ready()  # first, so that a failure half way is undone as well
    make_ready = partial(attester.set_gpus_ready, True)
    await _in_time(attestation.collect_s, "the GPUs to be made ready", make_ready)


async def _in_time(seconds: float, what: str, step: Callable[[], Awaitable[T]]) -> T:
    try:
        with trio.fail_after(seconds):
            return await step()
    except trio.TooSlowError:
        raise AttesterUnavailable(f"expected {what} within {seconds:g} s") from None


async def _self_test(
    config: MeasuredConfig, identity: Identity, engine: RunningEngine, log: Log
) -> None:
    address, limits, model = engine.address, config.limits, config.model.id
    if not identity.claims_determinism:
        await warm_up(address, limits, model=model, task=config.model.task)
        log.warning("no_determinism_required")
        return
    digest = await self_test(address, limits, model=model, task=config.model.task)
    log.info("deterministic", output=format_sha256(digest))


async def _self_check(reattestation: Reattestation, reports: Reports) -> AttestationResult:
    result = await reattestation.once()
    await reports.null_form()
    return result


async def _model(config: MeasuredConfig, lifecycle: Lifecycle) -> ModelTokenizer | None:
    def report(detail: str) -> None:
        trio.from_thread.run_sync(lifecycle.describe, detail)

    await trio.to_thread.run_sync(
        partial(verify_model_files, config.model, progress=report), abandon_on_cancel=True
    )
    return await trio.to_thread.run_sync(load_tokenizer, Path(config.model.path))


def write_public_file(path: Path, data: bytes) -> None:
    """Write a file that readers see whole or not at all, mode 0644.

    Raises:
        ConfigError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
