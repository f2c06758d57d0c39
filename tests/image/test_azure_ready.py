"""The ready report, against a server that speaks as Azure's does to an agent."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PROGRAM = Path(__file__).parent.parent.parent / "image/mkosi/files/azure/azure-ready"
ADDRESS = "http://168.63.129.16"

GOAL_STATE = """\
<?xml version="1.0" encoding="utf-8"?>
<GoalState xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
  <Version>2012-11-30</Version>
  <Incarnation>{incarnation}</Incarnation>
  <Machine>
    <ExpectedState>Started</ExpectedState>
    <StopRolesDeadlineHint>300000</StopRolesDeadlineHint>
    <LBProbePorts><Port>16001</Port></LBProbePorts>
    <ExpectHealthReport>FALSE</ExpectHealthReport>
  </Machine>
  <Container>
    <ContainerId>{container}</ContainerId>
    <RoleInstanceList>
      <RoleInstance>
        <InstanceId>{instance}</InstanceId>
        <State>Started</State>
        <Configuration><HostingEnvironmentConfig>http://127.0.0.1/x</HostingEnvironmentConfig>
        </Configuration>
      </RoleInstance>
    </RoleInstanceList>
  </Container>
</GoalState>
"""
KNOWN = {
    "incarnation": "2",
    "container": "c6d5526c-5ac2-4200-b6e2-56f2b70c5ab2",
    "instance": "5b9d3f0a._dcv-0",
}


@dataclass
class Wire:
    """What it answers, and what it was asked."""

    port: int = 0
    goal_state: str = GOAL_STATE.format(**KNOWN)
    status: int = 200
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


@contextmanager
def wire_server(wire: Wire) -> Iterator[None]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body: bytes) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            length = int(headers.get("content-length", 0))
            wire.asked.append((self.command, self.path, headers, self.rfile.read(length)))
            # Without the version of the protocol it says 400, as theirs does.
            status = wire.status if headers.get("x-ms-version") == "2012-11-30" else 400
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer(wire.goal_state.encode())

        def do_POST(self) -> None:
            self.answer(b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    wire.port = server.server_port
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def report(wire: Wire) -> subprocess.CompletedProcess[str]:
    """The program as it is, but for the one address in it."""
    text = PROGRAM.read_text()
    assert text.count(ADDRESS) == 1
    with wire_server(wire):
        return subprocess.run(
            [sys.executable, "-I", "-c", text.replace(ADDRESS, f"http://127.0.0.1:{wire.port}")],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


def test_a_machine_that_is_up_says_so_in_the_names_that_it_was_given() -> None:
    wire = Wire()
    done = report(wire)
    assert done.returncode == 0, done.stderr
    (get, goal, *_), (post, health, headers, body) = wire.asked
    assert (get, goal) == ("GET", "/machine?comp=goalstate")
    assert (post, health) == ("POST", "/machine?comp=health")
    assert headers["content-type"] == "text/xml;charset=utf-8"
    assert headers["x-ms-agent-name"] == "dcv"
    told = ET.fromstring(body)
    assert told.tag == "Health"
    assert told.findtext("GoalStateIncarnation") == KNOWN["incarnation"]
    assert told.findtext("Container/ContainerId") == KNOWN["container"]
    role = told.find("Container/RoleInstanceList/Role")
    assert role is not None
    assert role.findtext("InstanceId") == KNOWN["instance"]
    assert role.findtext("Health/State") == "Ready"


def test_identifiers_that_are_more_than_that_are_not_echoed() -> None:
    for hostile in ("a&b", "<x/>", "a" * 129, ""):
        wire = Wire(goal_state=GOAL_STATE.format(**KNOWN | {"container": hostile}))
        done = report(wire)
        assert done.returncode == 1
        assert "the goal state has no ContainerId" in done.stderr
        assert len(wire.asked) == 1


def test_a_server_that_refuses_fails_the_unit_which_tries_again() -> None:
    wire = Wire(status=503)
    assert report(wire).returncode == 1
    unit = (PROGRAM.parents[4] / "systemd/profiles/azure/dcv-azure-ready.service").read_text()
    assert "Restart=on-failure\n" in unit


def test_a_goal_state_without_end_is_read_to_a_bound() -> None:
    wire = Wire(goal_state="x" * (1 << 20) + GOAL_STATE.format(**KNOWN))
    done = report(wire)
    assert done.returncode == 1
    assert "the goal state has no Incarnation" in done.stderr
