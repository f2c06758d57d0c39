"""How SGLang is started: where secrets are, what the settings say, what nobody may override."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.config import REFUSED_ENGINE_ARGUMENTS, Engine, Model
from appliance.engine.command import (
    EngineCommand,
    EngineKeys,
    engine_command,
    engine_settings,
    parse_extra_args,
)
from appliance.errors import ConfigError
from appliance.wire.canonical import JsonObject, parse_json_object

API_KEY, ADMIN_KEY = "a1" * 32, "b2" * 32
KEYS = EngineKeys(api=API_KEY, admin=ADMIN_KEY)
MODEL = Model(id="m", path="/models/m", files={})
ENGINE = Engine(python="/opt/engine/bin/python", runtime_dir="/run/dcv/engine")

# Every spelling that SGLang 0.5.23 has for what our configuration sets.
OUR_OPTIONS = [
    "admin-api-key",
    "api-key",
    "attention-backend",
    "context-length",
    "data-parallel-size",
    "device",
    "dist-init-addr",
    "dp-size",
    "dtype",
    "enable-deterministic-inference",
    "enable-metrics",
    "host",
    "is-embedding",
    "log-level",
    "log-level-http",
    "max-running-requests",
    "max-total-tokens",
    "mem-fraction-static",
    "model",
    "model-path",
    "nccl-init-addr",
    "nnodes",
    "node-rank",
    "port",
    "random-seed",
    "reasoning-parser",
    "served-model-name",
    "sleep-on-idle",
    "stream-interval",
    "tensor-parallel-size",
    "tool-call-parser",
    "tp-size",
]

# What SGLang 0.5.23 has to log or dump content, listen, send content elsewhere, run other code.
REFUSED_OPTIONS = [
    "config",
    "crash-dump-folder",
    "custom-sigquit-handler",
    "custom-weight-loader",
    "debug-tensor-dump-input-file",
    "debug-tensor-dump-layers",
    "debug-tensor-dump-output-folder",
    "decoupled-spec-bind-endpoint",
    "decoupled-spec-connect-endpoints",
    "disaggregation-bootstrap-port",
    "disaggregation-mode",
    "enable-custom-logit-processor",
    "enable-return-hidden-states",
    "enable-trace",
    "encoder-register-urls",
    "encoder-urls",
    "export-metrics-to-file",
    "export-metrics-to-file-dir",
    "fastapi-root-path",
    "file-storage-path",
    "forward-hooks",
    "gated-launch-port",
    "grpc-http-sidecar-port",
    "grpc-mode",
    "grpc-port",
    "hicache-storage-backend",
    "hicache-storage-backend-extra-config",
    "kv-events-config",
    "load-publish-endpoint",
    "log-requests",
    "log-requests-format",
    "log-requests-level",
    "log-requests-target",
    "modelexpress-config",
    "msprobe-dump-config",
    "otlp-traces-endpoint",
    "remote-instance-weight-loader-backend",
    "remote-instance-weight-loader-seed-instance-ip",
    "sidecar",
    "sidecar-args",
    "smg-grpc-mode",
    "smg-http-sidecar-port",
    "spec-trace-dir",
    "ssl-certfile",
    "ssl-keyfile",
    "ssl-keyfile-password",
    "tool-server",
    "trust-remote-code",
    "trust-request-chat-template",
    "unified-cache-external-linker-config",
    "use-ray",
    "weight-cache-mode",
    "weight-cache-socket",
]

ABBREVIATIONS = sorted(
    {
        option[:length]
        for option in [*OUR_OPTIONS, *REFUSED_OPTIONS]
        for length in range(1, len(option) + 1)
        if not option[:length].endswith("-")
    }
)


def command(engine: Engine = ENGINE, model: Model = MODEL) -> EngineCommand:
    return engine_command(engine, model, port=31000, keys=KEYS, threads=2)


def settings(engine: Engine = ENGINE, model: Model = MODEL) -> JsonObject:
    return parse_json_object(command(engine, model).settings_text.encode(), max_nesting=2)


def changed(**fields: object) -> Engine:
    return msgspec.structs.replace(ENGINE, **fields)


# ------------------------------------------------------------------------------------- secrets


def test_the_keys_are_in_the_settings_file_and_nowhere_else() -> None:
    made = command()
    assert settings()["api-key"] == API_KEY
    assert settings()["admin-api-key"] == ADMIN_KEY
    shown = f"{made.argv} {dict(made.environment)} {made!r} {made} {KEYS!r} {KEYS}"
    assert API_KEY not in shown
    assert ADMIN_KEY not in shown


def test_the_command_line_names_the_program_and_the_settings_file() -> None:
    assert command().argv == (
        "/opt/engine/bin/python",
        "-m",
        "sglang.launch_server",
        "--config",
        "/run/dcv/engine/settings.yaml",  # SGLang wants the suffix
    )
    assert command(changed(unsafe_command=("/bin/fake", "-x"))).argv[:3] == (
        "/bin/fake",
        "-x",
        "--config",
    )


def test_the_environment_is_made_and_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/tmp/evil.so")
    monkeypatch.setenv("PYTHONPATH", "/tmp/evil")
    monkeypatch.setenv("SGLANG_LOGGING_CONFIG_PATH", "/tmp/evil.json")
    assert set(command().environment) == {
        "GLOO_SOCKET_IFNAME",
        "HF_HUB_OFFLINE",
        "HOME",
        "LANG",
        "NCCL_SOCKET_IFNAME",
        "OMP_NUM_THREADS",
        "PATH",
        "PYTHONSAFEPATH",
        "PYTHONUNBUFFERED",
        "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE",
        "TRANSFORMERS_OFFLINE",
    }
    assert "evil" not in "".join(command().environment.values())


def test_python_path_and_processor_mode_are_set_where_they_are_configured() -> None:
    environment = command(changed(python_path=("/a", "/b"), device="cpu")).environment
    assert environment["PYTHONPATH"] == "/a:/b"
    assert environment["SGLANG_USE_CPU_ENGINE"] == "1"
    assert environment["OMP_NUM_THREADS"] == "2"


# ------------------------------------------------------------------------------------ settings


def test_the_settings_say_what_the_configuration_says() -> None:
    engine = changed(
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        tensor_parallel=2,
        data_parallel=3,
        context_length=4096,
        memory_fraction=0.85,
        max_running_requests=8,
        max_total_tokens=16384,
        stream_interval=4,
        random_seed=7,
        tool_call_parser="llama3",
        reasoning_parser="qwen3",
    )
    assert settings(engine) == {
        "model-path": "/models/m",
        "served-model-name": "m",
        "device": "cpu",
        "dtype": "float32",
        "attention-backend": "torch_native",
        "chunked-prefill-size": -1,
        "enable-deterministic-inference": True,
        "random-seed": 7,
        "tp-size": 2,
        "dp-size": 3,
        "stream-interval": 4,
        "context-length": 4096,
        "mem-fraction-static": 0.85,
        "max-running-requests": 8,
        "max-total-tokens": 16384,
        "tool-call-parser": "llama3",
        "reasoning-parser": "qwen3",
        "sleep-on-idle": True,
        "enable-metrics": True,
        "log-level": "info",
        "log-level-http": "warning",
        "host": "127.0.0.1",
        "port": 31000,
        "api-key": API_KEY,
        "admin-api-key": ADMIN_KEY,
    }


def test_what_is_not_configured_is_left_to_the_engine() -> None:
    absent = {"context-length", "mem-fraction-static", "max-running-requests", "max-total-tokens"}
    absent |= {"sleep-on-idle", "tool-call-parser", "reasoning-parser", "nnodes", "dist-init-addr"}
    assert not settings().keys() & absent


def test_what_decides_the_computation_holds_no_address_and_no_key() -> None:
    assert not engine_settings(ENGINE, MODEL).keys() & {"host", "port", "api-key", "admin-api-key"}


def test_one_node_meets_in_a_file_and_on_loopback_only() -> None:
    made = command()
    override = made.environment["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"]
    assert override == f"file://{made.init_file}"
    assert made.init_file == Path("/run/dcv/engine/torch.init")
    assert made.environment["GLOO_SOCKET_IFNAME"] == "lo"


def test_several_nodes_meet_at_the_coordinator_and_not_in_a_file() -> None:
    engine = changed(nodes=2, node_rank=1, coordinator="10.0.0.1:5000")
    found = settings(engine)
    assert (found["nnodes"], found["node-rank"]) == (2, 1)
    assert found["dist-init-addr"] == "10.0.0.1:5000"
    environment = command(engine).environment
    assert "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE" not in environment
    assert not {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} & environment.keys()


# What PyYAML's safe_load takes for a float (yaml/resolver.py): without a dot it is a string.
YAML_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?")


@given(st.sampled_from([0.85, 0.9, 0.01, 0.99]) | st.floats(0.01, 1, exclude_max=True))
def test_every_memory_fraction_is_a_float_to_yaml_and_without_exponent(fraction: float) -> None:
    text = command(changed(memory_fraction=fraction)).settings_text
    (written,) = re.findall(r'"mem-fraction-static": (.*),\n', text)
    assert YAML_FLOAT.fullmatch(written)
    assert "e" not in written
    assert float(written) == fraction


@pytest.mark.parametrize("name", ["smollm2 é", 'quote " and \\', "emoji 😀", "true", "1e3", "~"])
def test_a_name_of_any_spelling_reads_back_the_same(name: str) -> None:
    model = msgspec.structs.replace(MODEL, id=name)
    assert settings(model=model)["served-model-name"] == name
    # YAML's double-quoted scalars read \ud83d\ude00 as two characters, JSON's as one.
    assert not re.search(r"\\u[dD][89a-fA-F]", command(model=model).settings_text)


# ----------------------------------------------------------------------------------- extra_args


def test_extra_args_become_settings_and_ours_stand_last() -> None:
    extra = ("page-size=32", "--schedule-policy=lpm", "disable_radix_cache", "gc-threshold=-1")
    found = json.loads(command(changed(extra_args=extra)).settings_text)
    assert found["page-size"] == "32"
    assert found["schedule-policy"] == "lpm"
    assert found["disable-radix-cache"] is True
    assert found["gc-threshold"] == "-1"
    assert list(found)[:4] == [
        "page-size",
        "schedule-policy",
        "disable-radix-cache",
        "gc-threshold",
    ]


def test_on_a_cpu_prompts_are_not_cut_where_that_would_change_an_answer() -> None:
    cut = {"extra_args": ("chunked-prefill-size=512",)}
    for engine in (
        changed(device="cuda", **cut),
        changed(device="cpu", deterministic=False, **cut),
    ):
        assert settings(engine)["chunked-prefill-size"] == "512"
    with pytest.raises(ConfigError, match="chunked-prefill-size"):
        command(changed(device="cpu", **cut))
    # A whole prompt may need much: how much is left for it is not SGLang's guess.
    assert settings(changed(device="cpu"))["mem-fraction-static"] == 0.5
    assert settings(changed(device="cpu", memory_fraction=0.7))["mem-fraction-static"] == 0.7


@pytest.mark.parametrize("value", ["", "=", "a=b", "x y", '{"a": 1}', "-1", "-0.5", "1-2"])
def test_a_value_is_everything_behind_the_first_equals_sign(value: str) -> None:
    assert parse_extra_args([f"page-size={value}"]) == {"page-size": value}


@pytest.mark.parametrize("abbreviation", ABBREVIATIONS)
def test_no_abbreviation_of_an_option_that_is_ours_or_refused_is_accepted(
    abbreviation: str,
) -> None:
    for spelled in (abbreviation, abbreviation.replace("-", "_")):
        for argument in (spelled, f"--{spelled}", f"{spelled}=x", f"--{spelled}=x"):
            with pytest.raises(ConfigError, match=r"has its own key|may not be set"):
                parse_extra_args([argument])


def test_the_lists_of_this_test_cover_the_refusals_of_the_configuration() -> None:
    for refused in REFUSED_ENGINE_ARGUMENTS:
        covering = [
            option for option in REFUSED_OPTIONS + OUR_OPTIONS if option.startswith(refused)
        ]
        assert covering, refused


@pytest.mark.parametrize(
    "argument",
    [
        "",
        "=",
        "=x",
        "--",
        "---host=x",
        "-x",
        "host-=x",
        "a--b",
        "a b",
        "Host=::",
        "\uff48ost=::",
        "a.b=1",
        "host\n=x",
        "pagé=1",
    ],
)
def test_a_name_that_is_not_an_options_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match="expected `name=value`"):
        parse_extra_args([argument])


@pytest.mark.parametrize("value", ["--log-requests", "-h", "--host=0.0.0.0", "-", "--", "-1 --x"])
def test_a_value_cannot_smuggle_in_an_option(value: str) -> None:
    """SGLang makes `--lora-paths --log-requests` of it, and lora-paths takes no value as well."""
    with pytest.raises(ConfigError, match="value like an option"):
        parse_extra_args([f"lora-paths={value}"])


def test_a_refused_argument_keeps_the_command_from_being_made() -> None:
    with pytest.raises(ConfigError, match=r"`log-requests` may not be set"):
        command(changed(extra_args=("log-requests",)))


def test_a_model_that_embeds_is_started_so_and_keeps_no_prefixes() -> None:
    generating = engine_settings(ENGINE, MODEL)
    assert not generating.keys() & {"is-embedding", "disable-radix-cache"}
    embedding = engine_settings(ENGINE, msgspec.structs.replace(MODEL, task="embed"))
    added = {"is-embedding": True, "disable-radix-cache": True}
    assert embedding == generating | added
