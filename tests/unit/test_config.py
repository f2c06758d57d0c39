"""The measured configuration: what it takes, and how it says what it does not."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from appliance.config import (
    REFUSED_REQUEST_KEYS,
    MeasuredConfig,
    effective_config,
    load_config,
    parse_config,
)
from appliance.errors import EX_CONFIG, ConfigError

SHA256 = "0f" * 32
SMALLEST = f"""
[model]
id = "m"
path = "weights"
files = {{"model.safetensors" = "{SHA256}"}}

[auth]
mode = "loopback"

[attestation]
cpu = "sev_snp"

[engine]
python = "venv/bin/python"
"""
FOLDER = Path("/etc/dcv")


def parse(*sections: str) -> MeasuredConfig:
    return parse_config("\n".join([SMALLEST, *sections]), folder=FOLDER)


def with_auth(*lines: str, host: str = "127.0.0.1") -> MeasuredConfig:
    text = SMALLEST.replace('mode = "loopback"', "\n".join(lines))
    return parse_config(f'{text}\n[listen]\nhost = "{host}"', folder=FOLDER)


def refusal(*sections: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*sections)
    assert caught.value.exit_status == EX_CONFIG
    return caught.value.message


def test_the_smallest_file_takes_every_default() -> None:
    config = parse()
    assert (config.listen.host, config.listen.port) == ("127.0.0.1", 8443)
    assert config.tls.names == ("localhost", "127.0.0.1", "::1")
    assert config.limits.max_concurrent == 256
    assert config.engine.deterministic
    assert config.log.format == "auto"


def test_every_default_is_valid_by_its_own_declaration() -> None:
    config = parse()
    assert msgspec.convert(msgspec.to_builtins(config), MeasuredConfig, strict=True) == config


def test_the_effective_configuration_reads_back_as_the_same() -> None:
    config = parse(
        'tensor_parallel = 4\nextra_args = ["page-size=32"]\nmemory_fraction = 0.85',
        '[listen]\nhost = "::1"\nport = 0',
        "[limits]\nmax_nesting = 8",
    )
    plain = json.loads(json.dumps(effective_config(config)))
    assert msgspec.convert(plain, MeasuredConfig, strict=True) == config
    assert plain["limits"]["drain_s"] == 30.0


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[listne]\nport = 1", "unknown key listne; did you mean `listen`?"),
        ("[listen]\nprot = 1", "unknown key [listen] prot; did you mean `port`?"),
        (
            "tensor_paralel = 2",
            "unknown key [engine] tensor_paralel; did you mean `tensor_parallel`?",
        ),
        (
            "[limits]\nmax_body = 4096",
            "unknown key [limits] max_body; did you mean `max_body_bytes`?",
        ),
        (
            "[tls]\ncertificat_file = 'x'",
            "unknown key [tls] certificat_file; did you mean `certificate_file`?",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[listen]\nport = "8443"', "[listen] port: expected `int`, got `str`"),
        ("[listen]\nport = 8443.0", "[listen] port: expected `int`, got `float`"),
        ("[listen]\nport = true", "[listen] port: expected `int`, got `bool`"),
        ("[listen]\nport = 65536", "[listen] port: expected `int` <= 65535"),
        ("[listen]\nport = -1", "[listen] port: expected `int` >= 0"),
        ("[limits]\nidle_s = 0", "[limits] idle_s: expected `float` > 0.0"),
        ("[limits]\nidle_s = nan", "[limits] idle_s: expected `float` > 0.0"),
        ("[limits]\nidle_s = inf", "[limits] idle_s: expected `float` <= 86400.0"),
        ("[limits]\nmax_nesting = 257", "[limits] max_nesting: expected `int` <= 256"),
        ("[tls]\nnames = []", "[tls] names: expected `array` of length >= 1"),
        ("[tls]\nnames = [1]", "[tls] names[0]: expected `str`, got `int`"),
        ('[log]\nlevel = "loud"', "[log] level: invalid enum value 'loud'"),
        ("memory_fraction = 1.0", "[engine] memory_fraction: expected `float` < 1.0"),
        ("memory_fraction = 0.001", "[engine] memory_fraction: expected `float` >= 0.01"),
        ("memory_fraction = nan", "[engine] memory_fraction: expected `float` >= 0.01"),
        ("random_seed = 2147483648", "[engine] random_seed: expected `int` <= 2147483647"),
        (
            "ready_deadline_s = 1979-05-27",
            "[engine] ready_deadline_s: expected `float`, got `date`",
        ),
        ('extra_args = [""]', "[engine] extra_args[0]: expected `str` of length >= 1"),
    ],
)
def test_a_wrong_type_or_bound_is_named_as_the_file_spells_it(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "object missing required field `model`"),
        ('[model]\nid = "m"\npath = "p"', "model: object missing required field `files`"),
        ("model = 5", "model: expected `object`, got `int`"),
        ("[[model]]\nid = 'm'", "model: expected `object`, got `array`"),
    ],
)
def test_a_missing_section_or_key_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, folder=FOLDER)
    assert caught.value.message == message


@pytest.mark.parametrize("digest", ["", "0f" * 31, "0F" * 32, "0f" * 32 + "\\n", "g" * 64])
def test_a_file_digest_is_64_lowercase_hex_digits(digest: str) -> None:
    text = SMALLEST.replace(SHA256, digest)
    with pytest.raises(ConfigError, match=r"\[model\] files\[\.\.\.\]: expected `str` matching"):
        parse_config(text, folder=FOLDER)


@pytest.mark.parametrize(
    "text",
    ["model", "[model", "a = 1\na = 2", "a = " + "9" * 5000, "a = " + "[" * 5000, "a = '\x00'"],
)
def test_what_is_not_toml_is_said_to_be_so(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^not TOML"):
        parse_config(text, folder=FOLDER)


@pytest.mark.parametrize("host", ["localhost", "example.org", "", "127.0.0.1:80", "256.0.0.1"])
def test_the_host_to_listen_on_is_an_address_not_a_name(host: str) -> None:
    assert refusal(f'[listen]\nhost = "{host}"') == "[listen] host: expected a literal IP address"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::1", "192.0.2.1"])
def test_any_literal_address_may_be_listened_on(host: str) -> None:
    assert with_auth('mode = "unsafe_none"', host=host).listen.host == host


# --------------------------------------------------------------------------- settings together


def test_an_engine_has_an_interpreter_or_another_command() -> None:
    without = SMALLEST.replace('python = "venv/bin/python"', "")
    with pytest.raises(ConfigError, match=r"\[engine\] python: missing"):
        parse_config(without, folder=FOLDER)
    config = parse_config(without + 'unsafe_command = ["fake-engine"]', folder=FOLDER)
    assert config.engine.unsafe_command == ("fake-engine",)
    assert config.engine.python == ""


def test_several_nodes_need_a_coordinator() -> None:
    assert refusal("nodes = 2").startswith("[engine] coordinator: required")
    assert parse('nodes = 2\nnode_rank = 1\ncoordinator = "10.0.0.1:5000"').engine.node_rank == 1


@pytest.mark.parametrize(("nodes", "rank"), [(1, 1), (2, 2), (2, 63)])
def test_a_node_rank_is_below_the_number_of_nodes(nodes: int, rank: int) -> None:
    text = f'nodes = {nodes}\nnode_rank = {rank}\ncoordinator = "10.0.0.1:5000"'
    assert refusal(text) == f"[engine] node_rank: expected below nodes ({nodes})"


@pytest.mark.parametrize("key", sorted(REFUSED_REQUEST_KEYS))
def test_no_configuration_opens_a_key_that_reaches_into_the_engine(key: str) -> None:
    assert refusal(f'extra_request_keys = ["regex", "{key}"]') == (
        f"[engine] extra_request_keys: `{key}` may never come from a client"
    )


def test_harmless_request_keys_may_be_added() -> None:
    assert parse('extra_request_keys = ["regex", "ebnf"]').engine.extra_request_keys == (
        "regex",
        "ebnf",
    )


def api_key(name: str, digest: str = SHA256, **more: int) -> str:
    bounds = "".join(f", {bound} = {value}" for bound, value in more.items())
    return f'{{ name = "{name}", sha256 = "{digest}"{bounds} }}'


def test_keys_are_asked_for_unless_the_configuration_says_otherwise() -> None:
    with pytest.raises(ConfigError, match=r"\[auth\] keys: missing"):
        with_auth()
    config = with_auth(f"keys = [{api_key('ci.runner-1_x', max_concurrent=4)}]", host="0.0.0.0")
    assert config.auth.mode == "keys"
    assert config.auth.keys[0].max_concurrent == 4


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "::ffff:192.0.2.1"])
def test_nobody_asks_for_no_key_beyond_loopback_without_saying_unsafe(host: str) -> None:
    with pytest.raises(ConfigError, match=r"\[auth\] mode: `loopback` needs a loopback"):
        with_auth('mode = "loopback"', host=host)
    assert with_auth('mode = "unsafe_none"', host=host).auth.mode == "unsafe_none"


@pytest.mark.parametrize("name", ["", "a b", "a\\n", "x" * 65, "ü"])
def test_a_keys_name_is_a_short_word(name: str) -> None:
    with pytest.raises(ConfigError, match=r"\[auth\] keys\[0\]\.name: expected"):
        with_auth(f"keys = [{api_key(name)}]")


@pytest.mark.parametrize(
    ("second", "what"), [(("a", "1e" * 32), "name"), (("b", SHA256), "sha256")]
)
def test_every_name_and_every_key_is_there_once(second: tuple[str, str], what: str) -> None:
    with pytest.raises(ConfigError, match=f"expected every {what} once"):
        with_auth(f"keys = [{api_key('a')}, {api_key(*second)}]")


# ---------------------------------------------------------------------------------------- files


def test_relative_paths_are_taken_from_the_folder_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "dcv.toml"
    file.write_text(
        SMALLEST
        + 'runtime_dir = "/run/engine"\npython_path = ["cpu", "/opt/x"]\n'
        + '[tls]\ncertificate_file = "tls.pem"\n'
    )
    config = load_config(file)
    assert config.model.path == str(tmp_path / "weights")
    assert config.engine.python == str(tmp_path / "venv/bin/python")
    assert config.engine.runtime_dir == "/run/engine"
    assert config.engine.python_path == (str(tmp_path / "cpu"), "/opt/x")
    assert config.tls.certificate_file == str(tmp_path / "tls.pem")
    assert config.listen.status_socket == str(tmp_path / "status.sock")


def test_a_relative_path_to_the_file_means_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dcv.toml").write_text(SMALLEST)
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("dcv.toml")) == load_config(tmp_path / "dcv.toml")


def test_a_file_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file or directory"):
        load_config(tmp_path / "dcv.toml")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        load_config(tmp_path)


def test_a_file_that_is_not_utf_8_is_said_to_be_so(tmp_path: Path) -> None:
    file = tmp_path / "dcv.toml"
    file.write_bytes(SMALLEST.encode() + b"# \xff")
    with pytest.raises(ConfigError, match=r"cannot read .*: not UTF-8"):
        load_config(file)
