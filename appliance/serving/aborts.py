"""Telling the engine to stop generating for exchanges that ended early.

Closing the connection is not enough: SGLang looks for gone clients every four seconds where it
does not stream, and waits two seconds after the end where it does, and generates on meanwhile.
So an exchange that is abandoned is aborted by name. That takes a round trip, which the task of a
cancelled request must not make; a task of its own makes it.
"""

from __future__ import annotations

import trio

from appliance.engine.client import EngineAddress, open_exchange
from appliance.errors import EngineError
from appliance.log import Log
from appliance.wire.canonical import canonical_json

ABORT_S = 5.0
"""For one abort; past it the engine finds out by itself."""


class Aborts:
    """Engine requests to abort. `add` is callable from anywhere; `run` is its task.

    What waits is bounded by the number of admitted exchanges and their choices.
    """

    def __init__(self, admin: EngineAddress, *, log: Log) -> None:
        """`admin` carries the administrative key: the ordinary one may not abort."""
        self._admin = admin
        self._log = log
        self._waiting: list[str] = []
        self._added = trio.Event()

    def add(self, request_id: str) -> None:
        """Have an engine request aborted soon."""
        self._waiting.append(request_id)
        self._added.set()

    async def run(self) -> None:
        """Abort what is added, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._added.wait()
                self._added = trio.Event()
                waiting, self._waiting = self._waiting, []
                for request_id in waiting:
                    nursery.start_soon(self._abort, request_id)

    async def _abort(self, request_id: str) -> None:
        """Best effort: the engine may be gone, or be done with the request."""
        try:
            with trio.move_on_after(ABORT_S) as deadline:
                response = await open_exchange(
                    self._admin, "POST", "/abort_request", canonical_json({"rid": request_id})
                )
                try:
                    status = (await response.head()).status
                finally:
                    response.close()
                if status != 200:
                    self._log.warning("abort_refused", status=status)
        except EngineError as error:
            self._log.debug("abort_failed", code=error.code)
        else:
            if deadline.cancelled_caught:
                self._log.warning("abort_timeout", after_s=ABORT_S)
