"""A machine that vanishes: the appliance in one network namespace, its client in another.

Run as a program inside a network namespace of its own, see test_vanished. It starts `dcv serve`
here and a client beyond a virtual cable, pulls the cable at the client's end while an answer is
streamed, so that neither FIN nor RST ever comes, and prints as JSON how long it took to let go.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx2

SERVER, CLIENT = "10.77.0.1", "10.77.0.2"
CABLE = ("link", "add", "name", "here", "type", "veth", "peer", "name", "there")
PATIENCE_S = 60.0

CLIENT_PROGRAM = """
import socket, ssl, sys, time
sys.stdin.readline()  # the cable is plugged
context = ssl._create_unverified_context()
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 10) as tcp:
    with context.wrap_socket(tcp) as tls:
        body = sys.argv[3].encode()
        tls.sendall(b"POST /v1/chat/completions HTTP/1.1\\r\\nHost: localhost\\r\\n"
                    b"Content-Length: %d\\r\\n\\r\\n" % len(body) + body)
        answer = b""
        while b"data:" not in answer:
            answer += tls.recv(65536)
            assert b" 200 " in answer, answer
        print("streaming", flush=True)
        time.sleep(3600)
"""


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def log_event(folder: Path, name: str) -> dict[str, object]:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        for line in (folder / "log").read_text(errors="replace").splitlines():
            if f'"event": "{name}"' in line:
                found: dict[str, object] = json.loads(line)
                return found
        time.sleep(0.05)
    raise AssertionError((folder / "log").read_text()[-2000:])


def metric(url: object, name: str) -> float:
    for line in httpx2.get(str(url), trust_env=False).text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    raise AssertionError(name)


def wait_for_none(url: object, name: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while metric(url, name):
        assert time.monotonic() < until, f"{name} never came to 0"
        time.sleep(0.05)


def main(folder: Path, body: str) -> None:
    # 1. Two networks and a cable.
    command("ip", "link", "set", "lo", "up")
    command("ip", *CABLE)
    client = subprocess.Popen(
        ["unshare", "--net", sys.executable, "-c", CLIENT_PROGRAM, SERVER, "8443", body],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with (folder / "log").open("wb") as log:
        gateway = subprocess.Popen(
            [sys.executable, "-m", "appliance", "serve", "--config", folder / "dcv.toml"],
            stderr=log,
        )
    try:
        assert client.stdin is not None
        assert client.stdout is not None
        command("ip", "address", "add", f"{SERVER}/24", "dev", "here")
        command("ip", "link", "set", "here", "up")
        log_event(folder, "serving")  # by now the client is in its own network
        command("ip", "link", "set", "there", "netns", str(client.pid))
        within = ("nsenter", "--target", str(client.pid), "--net")
        command(*within, "ip", "address", "add", f"{CLIENT}/24", "dev", "there")
        command(*within, "ip", "link", "set", "there", "up")
        # 2. An answer is streamed to it.
        client.stdin.write("\n")
        client.stdin.flush()
        assert client.stdout.readline() == "streaming\n"
        url = log_event(folder, "metrics")["url"]
        assert metric(url, "dcv_exchanges_running") == 1
        # 3. The cable is pulled.
        command(*within, "ip", "link", "set", "there", "down")
        pulled = time.monotonic()
        wait_for_none(url, "dcv_exchanges_running")
        exchange_s = time.monotonic() - pulled
        wait_for_none(url, "dcv_connections_open")
        connection_s = time.monotonic() - pulled
        gateway.terminate()
        status = gateway.wait(PATIENCE_S)
        print(
            json.dumps(
                {"exchange_s": exchange_s, "connection_s": connection_s, "exit_status": status}
            )
        )
    finally:
        for process in (client, gateway):
            process.kill()
            process.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
