"""The OpenAPI document: it says what the appliance does, and the appliance does what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import requests
import schemathesis
import trio
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from appliance import errors
from appliance.config import MeasuredConfig, parse_config
from appliance.errors import (
    ApplianceError,
    CapacityError,
    EngineError,
    RequestError,
)
from appliance.log import configure_log
from appliance.serving.auth import Authenticator, hash_key
from appliance.web.app import create_app
from appliance.web.attestation import AttestationServices, GenerateRequest, VerifyRequest
from appliance.web.health import HealthSource
from appliance.web.openai import DetokenizeRequest, InferenceServices, TokenizeRequest
from appliance.web.openapi import openapi_document
from appliance.wire.canonical import MAX_SAFE_INTEGER, canonical_json
from appliance.wire.openai import ChatRequest, CompletionRequest, EmbeddingsRequest
from tests.integration.appliance import (
    MODEL,
    RunningAppliance,
    Sections,
    config_text,
    start_appliance,
    with_tokenizer,
)

BODIES = (
    ChatRequest,
    CompletionRequest,
    EmbeddingsRequest,
    TokenizeRequest,
    DetokenizeRequest,
    GenerateRequest,
    VerifyRequest,
)
KEY = "dcv_alice"
WITH_KEYS: Sections = {
    "auth": {"mode": "keys", "keys": [{"name": "alice", "sha256": hash_key(KEY)}]}
}

EXAMPLES = 150
"""Of each operation, and as many again of what it should refuse."""

REFUSALS = ["400", "404", "412", "413"]
"""What is forbidden is refused with one of these, and never as a failure of ours."""

REQUEST_S = 10.0
RUN_S = 400.0

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


def configured(folder: Path, sections: Sections | None = None) -> MeasuredConfig:
    return parse_config(config_text(folder, sections=sections), folder=folder)


def document(folder: Path, sections: Sections | None = None) -> dict[str, Any]:
    found: dict[str, Any] = openapi_document(configured(folder, sections))
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Path, method and description of every operation."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method.upper(), operation


def no_metrics() -> SimpleNamespace:
    """Of an application that nobody asks anything."""
    return SimpleNamespace(gauge=lambda *_about: None)


def test_every_route_is_in_the_document_and_nothing_else(tmp_path: Path) -> None:
    config = configured(tmp_path)
    services = cast(
        InferenceServices,
        SimpleNamespace(
            config=config, metrics=no_metrics(), authenticator=Authenticator(config.auth)
        ),
    )
    log = configure_log(format="json", level="error")
    proof = cast(AttestationServices, SimpleNamespace(config=services.config))
    app = create_app(services, proof, cast(HealthSource, None), csr=b"", storage_key=None, log=log)
    routes = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method)
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    documented = [(path, method) for path, method, _ in operations(document(tmp_path))]
    assert routes == set(documented)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_every_declared_key_is_in_the_document_and_no_other_is_allowed(
    tmp_path: Path, body: type[msgspec.Struct]
) -> None:
    schema = document(tmp_path)["components"]["schemas"][body.__name__]
    fields = msgspec.structs.fields(body)
    assert schema["properties"].keys() == {field.encode_name for field in fields}
    assert set(schema["required"]) == {field.encode_name for field in fields if field.required}
    assert schema["additionalProperties"] is False


def test_an_operators_keys_are_named_and_change_no_declared_one(tmp_path: Path) -> None:
    sections: Sections = {"engine": {"extra_request_keys": ["regex", "seed"]}}
    schemas = document(tmp_path, sections)["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest"):
        properties = schemas[name]["properties"]
        assert "regex" in properties
        assert properties["seed"]["maximum"] == MAX_SAFE_INTEGER
    assert "regex" in schemas["EmbeddingsRequest"]["properties"]
    assert "regex" not in schemas["TokenizeRequest"]["properties"]


def test_what_code_decides_is_said_too(tmp_path: Path) -> None:
    found = document(tmp_path, {"limits": {"max_choices": 3}})["components"]["schemas"]
    chat = found["ChatRequest"]["properties"]
    assert chat["model"] == {"enum": [MODEL]}
    assert chat["n"]["maximum"] == 3
    assert chat["provider"]["properties"].keys() == {"aci_verified", "aci_session_ids"}
    assert "\\Z" not in json.dumps(found)


def test_keys_are_asked_for_in_the_document_only_where_they_are_asked_for(tmp_path: Path) -> None:
    without, with_keys = document(tmp_path), document(tmp_path, WITH_KEYS)
    assert "securitySchemes" not in without["components"]
    assert "401" not in without["components"]["responses"]
    chat = without["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert "429" not in chat  # a bound of a key's; that of a peer is for reports
    assert not any("security" in operation for _, _, operation in operations(without))
    assert with_keys["components"]["securitySchemes"] == {
        "api_key": {"type": "http", "scheme": "bearer"}
    }


async def test_an_operation_with_security_refuses_without_a_key_and_no_other_does(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(nursery, tmp_path, sections=WITH_KEYS)
    async with appliance.client() as client:
        served = (await client.get("/openapi.json")).json()
        for path, method, operation in operations(served):
            response = await client.request(method, path.replace("{model_id}", MODEL))
            assert ("security" in operation) == (response.status_code == 401), path
            assert str(response.status_code) in operation["responses"], path


def test_every_error_of_a_request_is_in_the_document(tmp_path: Path) -> None:
    responses = document(tmp_path, WITH_KEYS)["components"]["responses"]
    documented = {
        code: int(status)
        for status, response in responses.items()
        for code in _codes(response["content"]["application/json"]["schema"])
    }
    # No operation's own: where there is no operation, and before there are any.
    elsewhere = {
        errors.MethodNotAllowed,
        errors.EngineStartFailed,
        errors.EngineNotDeterministic,
        errors.EngineExposed,
    }
    expected = {
        leaf.code: leaf.http_status
        for kind in (RequestError, CapacityError, EngineError, errors.AttestationFailed)
        for leaf in _leaves(kind)
        if leaf not in elsewhere
    }
    expected |= {"malformed": 400, "engine_refused": 400}
    assert documented == expected


def _codes(schema: dict[str, Any]) -> list[str]:
    codes: list[str] = schema["properties"]["error"]["properties"]["code"]["enum"]
    return codes


def _leaves(kind: type[ApplianceError]) -> Iterator[type[ApplianceError]]:
    for child in kind.__subclasses__():
        yield from _leaves(child)
    if not kind.__subclasses__():
        yield kind


def test_the_same_configuration_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    text = config_text(tmp_path)
    program = (
        "import pathlib, sys\n"
        "from appliance.config import parse_config\n"
        "from appliance.web.openapi import openapi_document\n"
        "from appliance.wire.canonical import canonical_json\n"
        "config = parse_config(sys.stdin.read(), folder=pathlib.Path(sys.argv[1]))\n"
        "sys.stdout.buffer.write(canonical_json(openapi_document(config)))\n"
    )
    for seed in ("1", "2"):
        told = subprocess.run(
            [sys.executable, "-c", program, tmp_path],
            input=text.encode(),
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        assert told == canonical_json(document(tmp_path))


async def test_what_the_document_allows_and_what_it_forbids_is_answered_as_it_says(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    """Schemathesis: no 500, no hang, nothing left; statuses, types and shapes as documented."""
    sections = {**with_tokenizer(tmp_path), "limits": {"reports_per_minute": 1_000_000}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    with trio.fail_after(RUN_S):
        answered = await trio.to_thread.run_sync(
            partial(ask_everything, appliance), abandon_on_cancel=True
        )
    for operation in ("chat", "completion", "tokenize", "detokenize"):
        assert answered[operation, 200] >= 5, answered
        assert answered[operation, 400] >= 20, answered
    assert await appliance.engine_seen()
    with trio.fail_after(5):
        while await running(appliance) or open_connections(appliance.port):
            await trio.sleep(0.05)
        while await appliance.engine_counter("sglang:num_running_reqs"):
            await trio.sleep(0.05)
    assert not [line for line in appliance.log_lines if line["level"] == "error"]


def ask_everything(appliance: RunningAppliance) -> Counter[tuple[str, int]]:
    """Every operation, with what it takes and with what it does not; counts the statuses."""
    answered = Counter[tuple[str, int]]()
    rejection = {"negative_data_rejection": {"expected-statuses": REFUSALS}}
    config = schemathesis.Config.from_dict({"checks": rejection})
    with requests.Session() as session:
        session.trust_env = False  # this machine's own authorities would take the place of ours
        session.verify = str(appliance.folder / "tls.pem")
        served = session.get(f"{appliance.url}/openapi.json", timeout=REQUEST_S).json()
        for found in schemathesis.openapi.from_dict(served, config=config).get_all_operations():
            assert isinstance(found, Ok), found
            operation = found.ok()
            described = served["paths"][operation.path][operation.method]
            if "operationId" not in described:
                continue  # an alias
            modes = [GenerationMode.POSITIVE]
            if described.keys() & {"parameters", "requestBody"}:
                modes.append(GenerationMode.NEGATIVE)
            for mode in modes:
                name = described["operationId"]
                statuses = ask_operation(appliance, session, operation, mode)
                answered.update({(name, status): n for status, n in statuses.items()})
    return answered


def ask_operation(
    appliance: RunningAppliance,
    session: requests.Session,
    operation: APIOperation[Any, Any, Any, Any],
    mode: GenerationMode,
) -> Counter[int]:
    """So many examples of one kind; counts the statuses."""
    statuses = Counter[int]()

    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Case[Any]) -> None:
        begun = time.monotonic()
        response = case.call(
            base_url=appliance.url, session=session, verify=session.verify, timeout=REQUEST_S
        )
        assert time.monotonic() - begun < REQUEST_S
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    ask()
    return statuses


async def running(appliance: RunningAppliance) -> int:
    """What `dcv status` tells."""
    async with await trio.open_unix_socket(appliance.config.listen.status_socket) as stream:
        told = b"".join([data async for data in stream])
    return int(json.loads(told)["running"])


def open_connections(port: int) -> int:
    """Connections at a local TCP port whose end is not over (proc(5), /proc/net/tcp)."""
    listening, over = "0A", "06"
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(
        int(local.rpartition(":")[2], 16) == port and state not in {listening, over}
        for _, local, _, state, *_ in lines
    )
