"""A client whose machine vanishes without FIN or RST is let go of, while it is streamed to."""

from __future__ import annotations

import gc
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.web.server import FLUSH_S
from appliance.web.tls import TlsStream
from tests.integration import two_networks
from tests.integration.appliance import MODEL, RunningAppliance, Sections, config_text
from tests.integration.wire import Wire

WRITE_S = 1.0
IN_A_NETWORK_OF_ITS_OWN = ("unshare", "--user", "--map-root-user", "--net")


@pytest.fixture
def networks() -> None:
    """Whether two networks and a cable can be made here, without touching the real one."""
    try:
        probe = subprocess.run(
            [*IN_A_NETWORK_OF_ITS_OWN, "ip", *two_networks.CABLE],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except FileNotFoundError:
        pytest.skip("there is no `unshare`")
    if probe.returncode != 0:
        pytest.skip(f"no network namespaces here: {probe.stderr.strip()}")


@pytest.mark.usefixtures("networks")
def test_a_machine_that_vanishes_in_mid_stream_is_let_go_of(tmp_path: Path) -> None:
    sections: Sections = {
        "listen": {"host": two_networks.SERVER, "port": 8443, "metrics_port": 0},
        "auth": {"mode": "unsafe_none"},
        "limits": {"write_s": WRITE_S},
    }
    (tmp_path / "dcv.toml").write_text(config_text(tmp_path, sections=sections))
    body = {
        "model": MODEL,
        "stream": True,
        "max_tokens": 4000,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": "[[mode:slow:50]] Go"}],
    }
    ran = subprocess.run(
        [
            *IN_A_NETWORK_OF_ITS_OWN,
            *(sys.executable, two_networks.__file__, str(tmp_path), json.dumps(body)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    print(f"let go of after {result}")
    # The kernel gives up at the first retransmission after TCP_USER_TIMEOUT; these double.
    assert WRITE_S < result["exchange_s"] < 3 * (WRITE_S + FLUSH_S) + 2
    assert result["connection_s"] < 3 * (WRITE_S + FLUSH_S) + FLUSH_S + 2
    assert result["exit_status"] == 0


async def test_a_silent_connection_is_probed_so_that_a_vanished_peer_is_noticed(
    appliance: RunningAppliance,
) -> None:
    """While an answer is computed and nothing is written only probes can tell."""
    async with Wire.open(appliance):
        [server_end] = [
            found._socket
            for found in gc.get_objects()
            if isinstance(found, TlsStream) and found._socket.fileno() >= 0
        ]

        def option(name: int) -> int:
            return server_end.getsockopt(socket.IPPROTO_TCP, name)

        assert server_end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        probes_s = option(socket.TCP_KEEPCNT) * option(socket.TCP_KEEPINTVL)
        assert option(socket.TCP_KEEPIDLE) + probes_s <= 60
        limits = appliance.config.limits
        assert option(socket.TCP_USER_TIMEOUT) == (limits.write_s + FLUSH_S) * 1000
