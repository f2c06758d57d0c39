"""`just demo`: boot the appliance with the real SGLang, ask it one question, show the answer; ask
under verification, replay that answer, and verify it offline: as it is, and with one byte changed.

It runs the `dcv` command as an operator would and the unmodified `openai` package as a developer
would, over TLS, trusting nothing but the certificate the appliance wrote at its boot.
"""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import openai
from paths import LAYOUT
from rich.console import Console
from serve import MODEL_ID, write_config

QUESTION: Final = "What is the capital of France?"
VERIFIED_QUESTION: Final = "Tell me about the sea in one sentence."
"""Sampled, so that a replay has something to show."""
EXIT_WARNING: Final = 3
"""Of `dcv verify` and `dcv chat`."""
BOOT_S: Final = 900.0
STOP_S: Final = 60.0
DCV: Final = Path(sys.executable).with_name("dcv")

console = Console(highlight=False)


class DemoError(Exception):
    """The demonstration cannot go on; the text is for the person watching."""


def main(folder: Path = LAYOUT.run / "demo") -> int:
    """Run the demonstration, its files in `folder`; returns the exit status."""
    try:
        with running_appliance(folder) as url:
            ask(url, folder / "tls.pem")
            ask_verified(url, folder)
            replay(url, folder)
        verify_offline(folder)
    except DemoError as error:
        console.print(f"[red]{error}[/red]", soft_wrap=True)
        return 1
    return 0


@contextmanager
def running_appliance(folder: Path) -> Iterator[str]:
    """An appliance that serves, at the URL it yields; stopped in order afterwards."""
    port = _free_port()
    config = write_config(folder, engine="real", port=port)
    log_path = folder / "dcv.log"
    started = time.monotonic()
    with log_path.open("wb") as log:
        process = subprocess.Popen([DCV, "serve", "--config", config], stderr=log)
    try:
        with console.status("booting") as status:
            while (document := _status(folder)).get("status") != "serving":
                if process.poll() is not None:
                    raise DemoError(_last_words(log_path, process.returncode))
                if time.monotonic() - started > BOOT_S:
                    raise DemoError(f"expected the appliance to serve within {BOOT_S:g} s")
                status.update(_stage_text(document))
                time.sleep(0.25)
        console.print(f"[green]serving[/green] after {time.monotonic() - started:.0f} s")
        yield f"https://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise DemoError(_last_words(log_path, process.returncode))


def ask(url: str, certificate: Path) -> None:
    """Ask through the openai package and print the answer as it comes."""
    trust = ssl.create_default_context(cafile=certificate)
    client = openai.OpenAI(
        base_url=f"{url}/v1",
        api_key="none-needed-on-loopback",
        http_client=openai.DefaultHttpxClient(verify=trust),
    )
    console.print(f"[bold]> {QUESTION}[/bold]")
    asked = time.monotonic()
    first = None
    tokens = 0
    stream = client.chat.completions.create(
        model=MODEL_ID,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    )
    answer = ""
    for chunk in stream:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            if choice.delta.content:
                first = first or time.monotonic()
                answer += choice.delta.content
                console.print(choice.delta.content, end="", markup=False)
    console.print()
    if first is None:
        raise DemoError("the stream ended without an answer")
    took = time.monotonic() - first
    rate = f"{(tokens - 1) / took:.1f} tokens/s" if tokens > 1 and took > 0 else "one token"
    console.print(f"[dim]first token after {first - asked:.2f} s, {tokens} tokens, {rate}[/dim]")
    if "Paris" not in answer:
        raise DemoError("expected the answer to name Paris")


def ask_verified(url: str, folder: Path) -> None:
    """Ask the way a relying party does, and keep what proves the answer, content included."""
    console.print(f"[bold]> {VERIFIED_QUESTION}[/bold] (dcv chat)")
    command: list[str | Path] = [DCV, "chat", url, VERIFIED_QUESTION]
    command += ["--policy", folder / "policy.toml"]
    command += ["--save", folder / "bundle.json", "--with-content"]
    # The verdict comes on standard error, after the answer.
    if subprocess.run(command, check=False).returncode != EXIT_WARNING:
        raise DemoError("expected the answer's verdict to be warning: this hardware is simulated")


def replay(url: str, folder: Path) -> None:
    """Have the kept answer given again, from the recorded seed."""
    command: list[str | Path] = [DCV, "replay", folder / "bundle.json", "--against", url]
    command += ["--policy", folder / "policy.toml", "--json"]
    told = _json_of(subprocess.run(command, capture_output=True, text=True, check=False))
    console.print(f"replayed: [green]{told['result']}[/green]", soft_wrap=True)
    if told["result"] != "reproduced":
        raise DemoError("expected the same answer to the same request and seed")


def verify_offline(folder: Path) -> None:
    """Verify what was kept, as it is and with one byte of a GPU's report changed."""
    bundle = folder / "bundle.json"
    _verify("the saved bundle, offline", "warning", bundle, folder=folder)
    document = json.loads(bundle.read_text())
    gpu = document["report"]["attestation"]["evidence"]["gpu"]["gpus"][0]
    place = len(gpu["report_b64"]) // 2
    other = "A" if gpu["report_b64"][place] != "A" else "B"
    gpu["report_b64"] = gpu["report_b64"][:place] + other + gpu["report_b64"][place + 1 :]
    bundle.write_text(json.dumps(document))
    _verify("the same, one byte changed", "contraindicated", bundle, folder=folder)


def _verify(what: str, expected: str, *arguments: str | Path, folder: Path) -> None:
    command = [DCV, "verify", *arguments, "--policy", folder / "policy.toml", "--json"]
    outcome = _json_of(subprocess.run(command, capture_output=True, text=True, check=False))
    error = outcome["error"] or {}
    reasons = {one["got"] for one in outcome["findings"] if "test root" in one["got"]}
    why = error.get("message") or "; ".join(sorted(reasons)) or "no finding"
    style = {"warning": "yellow", "contraindicated": "red"}.get(outcome["verdict"], "green")
    console.print(f"{what}: [{style}]{outcome['verdict']}[/{style}]: {why}", soft_wrap=True)
    if outcome["verdict"] != expected:
        raise DemoError(f"expected the verdict {expected}")


def _json_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a command with `--json` said."""
    try:
        told: dict[str, Any] = json.loads(done.stdout)
    except ValueError as unreadable:
        raise DemoError(f"dcv {done.args[1]}: {done.stderr}") from unreadable
    return told


def _status(folder: Path) -> dict[str, object]:
    """The appliance's own status document; empty while it does not answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        try:
            connection.connect(str(folder / "status.sock"))
            data = b""
            while part := connection.recv(65_536):
                data += part
            document: dict[str, object] = json.loads(data)
        except (OSError, ValueError):
            return {}
    return document


def _stage_text(document: dict[str, object]) -> str:
    stage = document.get("stage")
    if not isinstance(stage, dict):
        return "starting"
    detail = f": {stage['detail']}" if stage.get("detail") else ""
    return f"stage {stage.get('number')} ({stage.get('name')}){detail}"


def _last_words(log_path: Path, status: int) -> str:
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    return "\n".join([f"dcv serve exited with status {status}; its last log lines:", *lines])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(main())
