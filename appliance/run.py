"""The root nursery: everything that runs has its owner here or below.

    run ─┬─ signals          SIGTERM and SIGINT drain; a second one ends at once, receipts written
         ├─ status socket    from the first moment on
         ├─ systemd          STATUS on every change, WATCHDOG while the loop turns
         └─ live ─┬─ receipts   shielded: they hear how everything else ended
                  ├─ collector  its end withdraws the appliance
                  └─ parts ─┬─ epochs
                            ├─ engine  supervised; its end withdraws the appliance
                            └─ boot, then the public listener until it has drained,
                               with re-attestation, aborts and the operator's certificate beside it

The order at the end is the reverse of the start: the listener closes and drains, then the engine
is stopped, the GPUs are taken back, the collector goes, and the rest is cancelled.
"""

from __future__ import annotations

import datetime
import secrets
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import trio

from appliance.attester.client import Attester, connect_attester, run_attester_child
from appliance.boot import Booted, boot, run_stage
from appliance.config import MeasuredConfig, Receipts
from appliance.credentials import NO_KEYS, VendorKeys
from appliance.endorsements.collect import Endorsements
from appliance.engine.command import EngineCommand, EngineKeys
from appliance.engine.process import RunningEngine, supervise
from appliance.errors import (
    ApplianceError,
    AttesterError,
    AttesterUnavailable,
    BootError,
    EngineError,
    InternalError,
    leaves,
)
from appliance.log import Log, describe_defect
from appliance.notify import Notifier
from appliance.rats.model import Anchors
from appliance.serving.aborts import Aborts
from appliance.serving.admission import Admission
from appliance.serving.auth import Authenticator
from appliance.serving.certificates import ChainFile
from appliance.serving.epochs import Epochs
from appliance.serving.exchanges import ReceiptDesk
from appliance.serving.keys import TlsIdentity
from appliance.serving.lifecycle import Lifecycle, State
from appliance.serving.metrics import Metrics
from appliance.serving.own_evidence import OwnEvidence, rim_authenticator
from appliance.serving.reattestation import Reattestation
from appliance.serving.receipts import ReceiptLimits, ReceiptStore
from appliance.serving.workers import Workers
from appliance.web.app import create_app
from appliance.web.attestation import AttestationServices, PeerRate, aci_headers
from appliance.web.health import HealthSource
from appliance.web.metrics import serve_metrics
from appliance.web.openai import InferenceServices
from appliance.web.server import open_listeners, serve, url_of
from appliance.web.status import serve_status
from appliance.wire.canonical import JsonObject

LISTEN_S = 30.0

SLACK_S = 10.0
"""For a request's evidence, beyond two collections: the one under way, and its own."""

TAKE_BACK_S = 5.0
"""For the GPUs to be told that they may take no more work; the engine is gone by then."""

CACHE_SECRET_BYTES = 32


async def run(
    config: MeasuredConfig,
    *,
    log: Log,
    notifier: Notifier,
    wall_clock: Callable[[], float] = time.time,
    random: Callable[[int], bytes] = secrets.token_bytes,
    operator_input_digest: str | None = None,
    vendor_keys: VendorKeys = NO_KEYS,
) -> ApplianceError | None:
    """Boot and serve until told to stop, or until it must not go on.

    Args:
        config: with the operator's input in it, whose digest is told to clients.

    Returns:
        None after an orderly stop; else what ended it (its `exit_status` is the process's), a
        defect of ours included, of which only types and places in the code are logged.
    """
    lifecycle = Lifecycle(wall_clock=wall_clock, clock=trio.current_time)
    admission = Admission(lifecycle, config.limits, tenants=len(config.auth.keys))
    metrics = Metrics(lifecycle, clock=trio.current_time)
    metrics.gauge("dcv_exchanges_running", "Admitted exchanges", lambda: admission.running)
    metrics.gauge("dcv_requests_waiting", "Requests in line for a place", lambda: admission.waiting)
    metrics.gauge("dcv_tasks", "Trio tasks that have not ended", _living_tasks)
    defects: list[dict[str, object]] = []
    appliance = _Appliance(
        config,
        lifecycle,
        admission,
        metrics,
        log,
        wall_clock,
        random,
        operator_input_digest,
        vendor_keys,
    )
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(_watch_signals, appliance, nursery.cancel_scope)
            await nursery.start(serve_status, Path(config.listen.status_socket), appliance.status)
            nursery.start_soon(_report, lifecycle, notifier, appliance.describe)
            nursery.start_soon(_feed_watchdog, notifier)
            if config.listen.metrics_port is not None:
                port = await nursery.start(
                    serve_metrics, config.listen.metrics_port, metrics.exposition
                )
                log.info("metrics", url=f"http://127.0.0.1:{port}/metrics")
            await appliance.live(notifier)
            nursery.cancel_scope.cancel()
    except* ApplianceError as group:
        first = leaves(group)[0]
        assert isinstance(first, ApplianceError)
        lifecycle.error = lifecycle.error or first
    except* Exception as group:  # noqa: BLE001  # a defect; by now all of it has ended
        defects = [describe_defect(leaf) for leaf in leaves(group)]
        lifecycle.error = lifecycle.error or InternalError("a defect ended the appliance")
    if lifecycle.error is not None:
        log.error(
            "appliance_ended",
            state=lifecycle.state.value,
            code=lifecycle.error.code,
            error=lifecycle.error.message,
            advice=lifecycle.error.advice,
            **({"defects": defects} if defects else {}),
        )
    return lifecycle.error


class _Appliance:
    """The parts that boot makes and the listener uses, and the order they live in."""

    def __init__(
        self,
        config: MeasuredConfig,
        lifecycle: Lifecycle,
        admission: Admission,
        metrics: Metrics,
        log: Log,
        wall_clock: Callable[[], float],
        random: Callable[[int], bytes],
        operator_input_digest: str | None,
        vendor_keys: VendorKeys,
    ) -> None:
        self.config = config
        self.vendor_keys = vendor_keys
        self.operator_input_digest = operator_input_digest
        self.lifecycle = lifecycle
        self.admission = admission
        self.health = HealthSource(config, lifecycle, admission, self.attestation)
        self.metrics = metrics
        self.log = log
        self.wall_clock = wall_clock
        self.random = random
        self.booting = trio.CancelScope()
        self.urls: list[str] = []
        self.receipts = open_receipts(config.receipts, now=wall_clock, log=log)
        self.tls: TlsIdentity | None = None
        self.attester: Attester | None = None
        self.gpus_are_ready = False
        self.reattestation: Reattestation | None = None

    async def live(self, notifier: Notifier) -> None:
        """Boot, serve, drain, stop the engine, take the GPUs back, let the collector go."""
        async with AsyncExitStack() as self.clients, trio.open_nursery() as self.collectors:
            keeping = await self.collectors.start(self._keep_receipts)
            try:
                keeping.shield = True  # whatever ends us, what exchanges say of it is written
                async with trio.open_nursery() as self.parts:
                    await self._boot_and_serve(notifier)
                    notifier.stopping()
                    self.parts.cancel_scope.cancel()
            finally:
                keeping.cancel()
                await self._take_gpus_back()
            self.collectors.cancel_scope.cancel()
        if self.lifecycle.state is State.DRAINING:
            self.lifecycle.enter(State.STOPPED)

    async def _boot_and_serve(self, notifier: Notifier) -> None:
        try:
            with self.booting:
                booted = await boot(
                    self.config,
                    owner=self,
                    operator_input_digest=self.operator_input_digest,
                    vendor_keys=self.vendor_keys,
                    lifecycle=self.lifecycle,
                    log=self.log,
                    now=self.wall_clock,
                    random=self.random,
                )
            if self.booting.cancelled_caught:
                self.lifecycle.enter(State.STOPPED)
            else:
                await self._serve(booted, notifier)
        except BootError as error:
            self.lifecycle.enter(State.FAILED, error=error)

    def drain(self) -> None:
        """Stop in an orderly way, from wherever we are. Idempotent."""
        if self.lifecycle.state is State.BOOTING:
            self.booting.cancel()
        elif self.lifecycle.state is State.SERVING:
            self.lifecycle.enter(State.DRAINING)
            self.admission.refuse_waiting()

    def status(self) -> JsonObject:
        """What the status socket says: the health document, the digest of the operator's input and
        the public parts of the TLS key."""
        document = self.health.snapshot()
        document["operator_input_digest"] = self.operator_input_digest
        document["tls"] = None
        if self.tls is not None:
            document["tls"] = {
                "spki_sha256": self.tls.spki_sha256,
                "csr": self.tls.csr.decode("ascii"),
            }
        return document

    def describe(self) -> str:
        """One line for an operator."""
        lifecycle, stage = self.lifecycle, self.lifecycle.stage
        match lifecycle.state:
            case State.BOOTING:
                detail = f": {stage.detail}" if stage.detail else ""
                return f"booting, stage {stage.number} ({stage.name}){detail}"
            case State.SERVING:
                where = f"{self.config.model.id} at {' '.join(self.urls)}"
                return f"serving {where}, attestation: {self.verdict()}"
            case State.DRAINING:
                return f"draining, {self.admission.running} running"
            case State.WITHDRAWN | State.FAILED:
                why = lifecycle.error.message if lifecycle.error else ""
                return f"{lifecycle.state.value}: {why}"
            case State.STOPPED:
                return "stopped"

    async def _serve(self, booted: Booted, notifier: Notifier) -> None:
        aborts = Aborts(booted.engine.admin, log=self.log)
        services = InferenceServices(
            config=self.config,
            admission=self.admission,
            engine=booted.engine.address,
            aborts=aborts,
            tokenizer=booted.tokenizer,
            parsing=self._workers("parsing"),
            tokenizing=self._workers("tokenizing"),
            vocabulary_size=booted.vocabulary_size,
            metrics=self.metrics,
            authenticator=Authenticator(self.config.auth),
            cache_secret=self.random(CACHE_SECRET_BYTES),
            random=self.random,
            created=int(self.wall_clock()),
            epochs=booted.epochs,
            # The epoch that is being collected, his own, and an appraisal that both wait for.
            evidence_s=3 * self.config.attestation.collect_s + SLACK_S,
            receipts=ReceiptDesk(
                identity=booted.identity,
                store=self.receipts,
                keyset_digest=lambda: booted.reports.keyset_digest,
                max_bytes=self.config.limits.max_response_bytes,
                random=self.random,
                now=self.wall_clock,
            ),
        )
        proof = AttestationServices(
            config=self.config,
            identity=booted.identity,
            own=booted.own,
            epochs=booted.epochs,
            reports=booted.reports,
            authenticator=services.authenticator,
            now=self.wall_clock,
            receipts=self.receipts,
            rate=PeerRate(self.config.limits.reports_per_minute),
            parsing=services.parsing,
        )
        self.reattestation = booted.reattestation
        app = create_app(
            services,
            proof,
            self.health,
            csr=booted.tls.csr,
            storage_key=booted.storage_key,
            log=self.log,
        )
        listeners = await run_stage(
            10,
            "listener",
            partial(open_listeners, self.config.listen),
            deadline_s=LISTEN_S,
            lifecycle=self.lifecycle,
            log=self.log,
        )
        self.urls = [url_of(listener) for listener in listeners]
        async with trio.open_nursery() as helpers:
            helpers.start_soon(aborts.run)
            helpers.start_soon(booted.reattestation.run)
            if self.config.tls.chain_file:
                await helpers.start(self._watch_chain, booted)
            self.lifecycle.enter(State.SERVING)
            if self.booting.cancel_called:  # told to stop after the stages that could be cancelled
                self.drain()
            notifier.ready()
            self.log.info("serving", urls=self.urls, model=self.config.model.id)
            await serve(
                app,
                listeners,
                booted.tls_context,
                limits=self.config.limits,
                lifecycle=self.lifecycle,
                admission=self.admission,
                metrics=self.metrics,
                headers=lambda: [
                    (name.encode("ascii"), value.encode("ascii"))
                    for name, value in aci_headers(booted.reports).items()
                ],
                log=self.log,
            )
            helpers.cancel_scope.cancel()

    def _workers(self, what: str) -> Workers:
        limits = self.config.limits
        return Workers(what, max_waiting=limits.max_waiting, max_wait_s=limits.max_wait_s)

    async def _watch_chain(
        self, booted: Booted, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """At this boot's start no chain can fit, unless it was made while the model loaded."""
        tls = self.config.tls
        chain = ChainFile(
            Path(tls.chain_file), booted.tls, booted.tls_context, now=self._now, log=self.log
        )
        await chain.watch(tls.chain_interval_s, task_status=task_status)

    def attestation(self) -> JsonObject | None:
        """For the health document."""
        return None if self.reattestation is None else self.reattestation.health()

    def verdict(self) -> str:
        """The last one on ourselves."""
        result = self.reattestation.result if self.reattestation is not None else None
        return "none" if result is None else result.verdict.value

    # What `boot` asks of its owner.

    def publish_tls(self, identity: TlsIdentity) -> None:
        """Told at stage 2."""
        self.tls = identity

    async def start_attester(self, anchors: Anchors) -> tuple[Attester, OwnEvidence]:
        """Connect to the collector's unit, or start a collector as a child."""
        settings = self.config.attestation
        endorsements = await self.clients.enter_async_context(
            Endorsements(
                settings,
                anchors,
                authenticate_rim=rim_authenticator(anchors.nvidia_rim),
                log=self.log,
                keys=self.vendor_keys,
                now=self._now,
            )
        )
        attester: Attester = await self.collectors.start(self._keep_attester)
        self.attester = attester
        return attester, OwnEvidence(
            self.config, attester, endorsements, anchors, now=self.wall_clock
        )

    def start_epochs(self, epochs: Epochs) -> None:
        """Form epochs until the end."""
        self.parts.start_soon(epochs.run)

    def gpus_ready(self) -> None:
        """Told at stage 6: from now on they have to be taken back."""
        self.gpus_are_ready = True

    async def start_engine(self, command: EngineCommand, keys: EngineKeys) -> RunningEngine:
        """Supervise the engine until the end."""
        engine: RunningEngine = await self.parts.start(self._keep_engine, command, keys)
        return engine

    def publish_report(self, keyset_digest: bytes, report: bytes) -> None:
        """Kept beyond this start of the service."""
        self.receipts.add_report(keyset_digest, report)

    def withdraw(self, error: ApplianceError) -> None:
        """Stop serving at once, for good: running exchanges are ended with the reason."""
        if self.lifecycle.state in (State.SERVING, State.DRAINING):
            self.log.error("withdrawn", code=error.code, error=error.message)
            self.lifecycle.enter(State.WITHDRAWN, error=error)
            self.admission.refuse_waiting()

    async def _keep_receipts(self, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        """Hands out the scope that ends the store, after the last exchange."""
        async with trio.open_nursery() as keeping:
            await keeping.start(self.receipts.run)
            task_status.started(keeping.cancel_scope)

    async def _keep_attester(self, task_status: trio.TaskStatus[Attester]) -> None:
        """Once connected, the collector's end withdraws the appliance; during the boot the next
        stage that asks it fails."""
        settings, path = self.config.attestation, self.config.attestation.attester_socket
        try:
            if path:
                await connect_attester(path, settings, lost=self.withdraw, task_status=task_status)
            else:
                await run_attester_child(
                    settings, log=self.log, lost=self.withdraw, task_status=task_status
                )
        except AttesterUnavailable:
            if self.attester is None:
                raise

    async def _take_gpus_back(self) -> None:
        """Nothing may be put on GPUs that nobody watches any more."""
        if not self.gpus_are_ready or self.attester is None:
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + TAKE_BACK_S) as scope:
            try:
                await self.attester.set_gpus_ready(False)
            except AttesterError as error:
                self.log.error("gpus_not_taken_back", code=error.code, error=error.message)
        if scope.cancelled_caught:
            self.log.error("gpus_not_taken_back", error="the collector did not answer")

    async def _keep_engine(
        self,
        command: EngineCommand,
        keys: EngineKeys,
        task_status: trio.TaskStatus[RunningEngine],
    ) -> None:
        """Once the appliance serves, the engine's failure withdraws it."""
        try:
            await supervise(
                command,
                keys,
                self.config.engine,
                log=self.log,
                progress=self.lifecycle.describe,
                failed=self._engine_failed,
                task_status=task_status,
            )
        except EngineError:
            if self.lifecycle.state is not State.WITHDRAWN:
                raise

    def _engine_failed(self, error: EngineError) -> None:
        """Withdraw at once: a hung engine may take its whole grace to be stopped."""
        self.metrics.engine_failures.labels(error.code).inc()
        self.withdraw(error)

    def _now(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.wall_clock(), tz=datetime.UTC)


def open_receipts(receipts: Receipts, *, now: Callable[[], float], log: Log) -> ReceiptStore:
    """The store that `[receipts]` describes; its task opens the database."""
    limits = ReceiptLimits(
        max_age_s=receipts.max_age_days * 86_400,
        max_count=receipts.max_count,
        max_per_tenant=receipts.max_per_key,
        max_bytes=receipts.max_bytes,
        max_evidence_bytes=receipts.max_evidence_bytes,
    )
    return ReceiptStore(Path(receipts.dir), now=now, log=log, limits=limits)


def _living_tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


async def _watch_signals(
    appliance: _Appliance,
    everything: trio.CancelScope,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        first = True
        async for number in signals:
            appliance.log.info("signal", name=signal.Signals(number).name)
            if not first:
                everything.cancel()
            first = False
            appliance.drain()


async def _report(lifecycle: Lifecycle, notifier: Notifier, describe: Callable[[], str]) -> None:
    while True:
        notifier.status(describe())
        await lifecycle.wait_changed()


async def _feed_watchdog(notifier: Notifier) -> None:
    """As long as the event loop turns (sd_watchdog_enabled(3): at less than half the interval)."""
    if notifier.watchdog_s is None:
        return
    while True:
        notifier.watchdog()
        await trio.sleep(notifier.watchdog_s / 3)
