"""The root nursery: everything that runs has its owner here or below.

    run ─┬─ signals          SIGTERM and SIGINT drain; a second one ends at once
         ├─ status socket    from the first moment on
         ├─ systemd          STATUS on every change, WATCHDOG while the loop turns
         └─ live ─┬─ engine  supervised; its end withdraws the appliance
                  └─ boot, then the public listener until it has drained

The order at the end is the reverse of the start: the listener closes and drains, then the engine
is stopped, then the rest is cancelled.
"""

from __future__ import annotations

import datetime
import secrets
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from appliance.boot import Booted, boot, run_stage
from appliance.config import MeasuredConfig
from appliance.engine.command import EngineCommand, EngineKeys
from appliance.engine.process import RunningEngine, supervise
from appliance.errors import ApplianceError, BootError, EngineError
from appliance.log import Log
from appliance.notify import Notifier
from appliance.serving.aborts import Aborts
from appliance.serving.admission import Admission
from appliance.serving.auth import Authenticator
from appliance.serving.lifecycle import Lifecycle, State
from appliance.web.app import create_app
from appliance.web.health import HealthSource
from appliance.web.openai import InferenceServices
from appliance.web.server import open_listeners, serve, url_of
from appliance.web.status import serve_status

LISTEN_S = 30.0
CACHE_SECRET_BYTES = 32


async def run(
    config: MeasuredConfig,
    *,
    log: Log,
    notifier: Notifier,
    wall_clock: Callable[[], float] = time.time,
    random: Callable[[int], bytes] = secrets.token_bytes,
) -> ApplianceError | None:
    """Boot and serve until told to stop, or until it must not go on.

    Returns:
        None after an orderly stop; else what ended it (its `exit_status` is the process's).
    """
    lifecycle = Lifecycle(wall_clock=wall_clock, clock=trio.current_time)
    admission = Admission(lifecycle, config.limits)
    health = HealthSource(config=config, lifecycle=lifecycle, admission=admission)
    appliance = _Appliance(config, lifecycle, admission, health, log, wall_clock, random)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(_watch_signals, appliance, nursery.cancel_scope)
            await nursery.start(serve_status, Path(config.listen.status_socket), health.snapshot)
            nursery.start_soon(_report, lifecycle, notifier, appliance.describe)
            nursery.start_soon(_feed_watchdog, notifier)
            await appliance.live(notifier)
            nursery.cancel_scope.cancel()
    except* ApplianceError as group:
        failed = _first(group)
        lifecycle.error = lifecycle.error or failed
    if lifecycle.error is not None:
        log.error(
            "appliance_ended",
            state=lifecycle.state.value,
            code=lifecycle.error.code,
            error=lifecycle.error.message,
            advice=_advice(lifecycle.error),
        )
    return lifecycle.error


class _Appliance:
    """The parts that boot makes and the listener uses, and the order they live in."""

    def __init__(
        self,
        config: MeasuredConfig,
        lifecycle: Lifecycle,
        admission: Admission,
        health: HealthSource,
        log: Log,
        wall_clock: Callable[[], float],
        random: Callable[[int], bytes],
    ) -> None:
        self.config = config
        self.lifecycle = lifecycle
        self.admission = admission
        self.health = health
        self.log = log
        self.wall_clock = wall_clock
        self.random = random
        self.booting = trio.CancelScope()
        self.urls: list[str] = []

    async def live(self, notifier: Notifier) -> None:
        """Boot, serve, drain, stop the engine."""
        async with trio.open_nursery() as parts:
            try:
                with self.booting:
                    booted = await boot(
                        self.config,
                        start_engine=partial(self._start_engine, parts),
                        lifecycle=self.lifecycle,
                        log=self.log,
                        now=self._now,
                        random=self.random,
                    )
                if self.booting.cancelled_caught:
                    self.lifecycle.enter(State.STOPPED)
                else:
                    await self._serve(booted, notifier)
            except BootError as error:
                self.lifecycle.enter(State.FAILED, error=error)
            notifier.stopping()
            parts.cancel_scope.cancel()
        if self.lifecycle.state is State.DRAINING:
            self.lifecycle.enter(State.STOPPED)

    def drain(self) -> None:
        """Stop in an orderly way, from wherever we are. Idempotent."""
        if self.lifecycle.state is State.BOOTING:
            self.booting.cancel()
        elif self.lifecycle.state is State.SERVING:
            self.lifecycle.enter(State.DRAINING)

    def describe(self) -> str:
        """One line for an operator."""
        lifecycle, stage = self.lifecycle, self.lifecycle.stage
        match lifecycle.state:
            case State.BOOTING:
                detail = f": {stage.detail}" if stage.detail else ""
                return f"booting, stage {stage.number} ({stage.name}){detail}"
            case State.SERVING:
                return f"serving {self.config.model.id} at {' '.join(self.urls)}, not attested"
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
            authenticator=Authenticator(self.config.auth),
            cache_secret=self.random(CACHE_SECRET_BYTES),
            random=self.random,
            created=int(self.wall_clock()),
        )
        app = create_app(services, self.health, log=self.log)
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
            self.lifecycle.enter(State.SERVING)
            notifier.ready()
            self.log.info("serving", urls=self.urls, model=self.config.model.id)
            await serve(
                app,
                listeners,
                booted.tls.server_context(),
                limits=self.config.limits,
                lifecycle=self.lifecycle,
                admission=self.admission,
                log=self.log,
            )
            helpers.cancel_scope.cancel()

    async def _start_engine(
        self, nursery: trio.Nursery, command: EngineCommand, keys: EngineKeys
    ) -> RunningEngine:
        engine: RunningEngine = await nursery.start(self._keep_engine, command, keys)
        return engine

    async def _keep_engine(
        self,
        command: EngineCommand,
        keys: EngineKeys,
        task_status: trio.TaskStatus[RunningEngine],
    ) -> None:
        """Supervise the engine. Once the appliance serves, the engine's end withdraws it; running
        exchanges notice by themselves, their connections are gone."""
        try:
            await supervise(
                command,
                keys,
                self.config.engine,
                log=self.log,
                progress=self.lifecycle.describe,
                task_status=task_status,
            )
        except EngineError as error:
            if self.lifecycle.state not in (State.SERVING, State.DRAINING):
                raise
            self.log.error("withdrawn", code=error.code, error=error.message)
            self.lifecycle.enter(State.WITHDRAWN, error=error)

    def _now(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.wall_clock(), tz=datetime.UTC)


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


def _first(group: BaseExceptionGroup[ApplianceError]) -> ApplianceError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ApplianceError)
    return error


def _advice(error: ApplianceError) -> str:
    return error.cause.advice if isinstance(error, BootError) else error.advice
