"""The operator's input: it adds what it was given room for, lowers limits, and nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.config import Limits, MeasuredConfig, Operator, parse_config
from appliance.errors import EX_CONFIG, ConfigError
from appliance.operator_input import (
    MAX_BYTES,
    OperatorInput,
    load_operator_input,
    parse_operator_input,
    tighten,
)
from tests.unit.test_config import FOLDER, SHA256, SMALLEST, api_key

OTHER = "1e" * 32
LOOPBACK = 'mode = "loopback"'
ROOM = '[operator]\nmax_keys = 2\ndomains = ["example.com"]\nchain_file = "accepted"\n'


def measured(room: str = ROOM, auth: str = 'mode = "keys"', more: str = "") -> MeasuredConfig:
    text = SMALLEST.replace('mode = "loopback"', auth)
    return parse_config(f"{text}\n{room}\n{more}", folder=FOLDER)


def given_input(text: str) -> OperatorInput:
    return parse_operator_input(text.encode(), folder=FOLDER)


def refusal(text: str, config: MeasuredConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        tighten(config, given_input(text))
    assert caught.value.exit_status == EX_CONFIG
    return caught.value.message


def test_what_there_is_room_for_is_added_and_limits_are_lowered() -> None:
    text = (
        f"[auth]\nkeys = [{api_key('alice', max_concurrent=8)}]\n"
        '[tls]\nnames = ["Inference.Example.com"]\nchain_file = "chain.pem"\n'
        "[limits]\nmax_concurrent = 8\nbody_s = 5\n"
    )
    config = measured()
    result = tighten(config, given_input(text))
    assert [key.name for key in result.auth.keys] == ["alice"]
    assert result.auth.keys[0].max_concurrent == 8
    assert result.tls.names == ("Inference.Example.com",)
    assert result.tls.chain_file == str(FOLDER / "chain.pem")
    assert (result.limits.max_concurrent, result.limits.body_s) == (8, 5.0)
    assert given_input(text).digest == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def test_an_empty_file_changes_nothing() -> None:
    config = measured(auth=f"keys = [{api_key('a')}]")
    assert tighten(config, given_input("")) == config


KEY = f"[auth]\nkeys = [{api_key('b', OTHER)}]"


@pytest.mark.parametrize(
    ("text", "config", "says"),
    [
        (KEY, measured(auth='mode = "loopback"'), "[auth] keys: [auth] mode is `loopback`"),
        (KEY, measured("", f"keys = [{api_key('a')}]"), "[operator] max_keys is 0, got 1"),
        (KEY, measured(auth=f"keys = [{api_key('b')}]"), "[auth] keys: expected every name once"),
        (
            f"[auth]\nkeys = [{api_key('b')}]",
            measured(auth=f"keys = [{api_key('a')}]"),
            "[auth] keys: expected every sha256 once",
        ),
        ("", measured(), "[auth] keys: missing"),
        ('[tls]\nnames = ["badexample.com"]', measured(), "`badexample.com` is not within"),
        ('[tls]\nnames = ["example.com.evil"]', measured(), "`example.com.evil` is not within"),
        ('[tls]\nnames = ["192.0.2.1"]', measured(), "`192.0.2.1` is not within"),
        ('[tls]\nchain_file = "c"', measured("[operator]\nmax_keys = 1"), "chain_file refuses it"),
        (
            '[tls]\nchain_file = "c"',
            measured(more='[tls]\nchain_file = "m"'),
            "the measured file has its own",
        ),
        ("[limits]\nmax_concurrent = 257", measured(), "max_concurrent: expected at most 256"),
        ("[limits]\nidle_s = 75.001", measured(), "idle_s: expected at most 75.0"),
        ("[limits]\nmax_body_bytes_total = 1024", measured(), "max_body_bytes_total: expected at"),
    ],
)
def test_what_would_allow_more_is_refused_and_named(
    text: str, config: MeasuredConfig, says: str
) -> None:
    assert says in refusal(text, config)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[auth]\nmode = "unsafe_none"', "unknown key [auth] mode"),
        ('[tls]\nclient_ca_file = ""', "unknown key [tls] client_ca_file"),
        ('[operator]\ndomains = ["*"]', "unknown key operator"),
        ("[engine]\nextra_args = []", "unknown key engine"),
        ("[limits]\nmax_concurent = 1", "did you mean `max_concurrent`?"),
        ("[limits]\nmax_concurrent = 0", "[limits] max_concurrent: expected"),
        ("[limits]\nidle_s = nan", "[limits] idle_s: expected"),
        ('[tls]\nnames = "a"', "[tls] names: expected"),
        ('[tls]\nchain_file = "a\\u0000b"', "U+0000"),
        ("[", "not TOML"),
        ("#" * (MAX_BYTES + 1), f"expected at most {MAX_BYTES} bytes"),
    ],
)
def test_what_the_file_does_not_know_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        given_input(text)
    assert says in caught.value.message
    assert caught.value.message.startswith("the operator's input: ")


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "input.toml"
    with pytest.raises(ConfigError, match="cannot read the operator's input: No such file"):
        load_operator_input(path)
    path.write_bytes(b"# \xff")
    with pytest.raises(ConfigError, match="the operator's input: not UTF-8"):
        load_operator_input(path)
    path.write_bytes(b'[tls]\nchain_file = "chain.pem"\n')
    assert load_operator_input(path).chain_file == str(tmp_path / "chain.pem")


def test_any_name_and_address_may_be_allowed() -> None:
    config = measured('[operator]\ndomains = ["*"]', f"keys = [{api_key('a')}]")
    assert tighten(config, given_input('[tls]\nnames = ["192.0.2.1"]')).tls.names == ("192.0.2.1",)


# ----------------------------------------------------------------- never more than was measured

KEYS = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from("abcd"), "sha256": st.sampled_from([d * 64 for d in "0123"])}
    ),
    max_size=2,
    unique_by=(lambda key: key["name"], lambda key: key["sha256"]),
)
NAMES = st.lists(
    st.sampled_from(
        ["example.com", "a.example.com", "*.EXAMPLE.com", "xample.com", "b.test", "::1"]
    ),
    min_size=1,
    max_size=3,
)


def scaled(name: str, factor: float) -> int | float:
    """A limit around its default: bounds and nonsense are the declarations' business."""
    default: int | float = getattr(Limits(), name)
    return type(default)(default * factor)


LIMITS = st.dictionaries(
    st.sampled_from(Limits.__struct_fields__),
    st.sampled_from([0.5, 0.9, 1.0, 1.0, 0.0, 1.1, 64.0]),
    max_size=3,
).map(lambda factors: {name: scaled(name, factor) for name, factor in factors.items()})
INPUTS = st.fixed_dictionaries(
    {},
    optional={
        "auth": st.fixed_dictionaries({"keys": KEYS}),
        "tls": st.fixed_dictionaries(
            {}, optional={"names": NAMES, "chain_file": st.sampled_from(["c.pem", "/c.pem"])}
        ),
        "limits": LIMITS,
    },
)
MEASURED = st.builds(
    lambda auth, keys, domains, chain, own_chain: measured(
        f"[operator]\nmax_keys = {keys}\ndomains = {json.dumps(domains)}\nchain_file = '{chain}'",
        auth,
        f"[tls]\nchain_file = '{own_chain}'",
    ),
    st.sampled_from(['mode = "loopback"', 'mode = "keys"', f"keys = [{api_key('a', '0' * 64)}]"]),
    st.integers(1, 3),
    st.sampled_from([[], ["example.com"], ["example.com", "b.test"], ["*"]]),
    st.sampled_from(["refused", "accepted"]),
    st.sampled_from(["", "own.pem"]),
)


def toml(sections: dict[str, dict[str, object]]) -> str:
    """JSON's arrays are TOML's; its objects are not, so keys are written out."""

    def value(item: object) -> str:
        if isinstance(item, list):
            return "[" + ", ".join(map(value, item)) + "]"
        if isinstance(item, dict):
            return "{" + ", ".join(f"{key} = {value(part)}" for key, part in item.items()) + "}"
        return repr(item) if isinstance(item, float) else json.dumps(item)

    return "\n".join(
        f"[{name}]\n" + "\n".join(f"{key} = {value(item)}" for key, item in items.items())
        for name, items in sections.items()
    )


@settings(max_examples=500, deadline=None)
@given(MEASURED, INPUTS)
def test_whatever_is_given_the_result_allows_no_more_than_was_measured(
    config: MeasuredConfig, sections: dict[str, dict[str, object]]
) -> None:
    try:
        result = tighten(config, given_input(toml(sections)))
    except ConfigError:
        return
    room: Operator = config.operator
    # 1. Who may ask: the measured keys and so many more, and only where keys are asked for.
    assert result.auth.mode == config.auth.mode
    assert result.auth.keys[: len(config.auth.keys)] == config.auth.keys
    added = result.auth.keys[len(config.auth.keys) :]
    assert len(added) <= (room.max_keys if config.auth.mode == "keys" else 0)
    # 2. What they may take: nowhere more.
    for name in Limits.__struct_fields__:
        assert getattr(result.limits, name) <= getattr(config.limits, name)
    # 3. What it calls itself, and which certificate it looks for.
    if result.tls.names != config.tls.names:
        assert all(
            "*" in room.domains or any(f".{name.lower()}".endswith(f".{d}") for d in room.domains)
            for name in result.tls.names
        )
    if result.tls.chain_file != config.tls.chain_file:
        assert room.chain_file == "accepted"
        assert config.tls.chain_file == ""
    # 4. Everything else is as it was measured.
    replace = msgspec.structs.replace
    tls = replace(result.tls, names=config.tls.names, chain_file=config.tls.chain_file)
    assert replace(result, auth=config.auth, limits=config.limits, tls=tls) == config


def test_the_digest_is_of_the_exact_bytes() -> None:
    assert given_input("").digest != given_input("\n").digest
    assert SHA256 != OTHER


def test_credentials_are_named_by_the_operator_where_there_is_room_and_none_is_named() -> None:
    text = '[attestation]\nnvidia_service_key = "sealed_nvidia"\n'
    config = measured(ROOM + 'credentials = "accepted"\n', LOOPBACK)
    tightened = tighten(config, given_input(text)).attestation
    assert (tightened.nvidia_service_key, tightened.intel_pcs_key) == ("sealed_nvidia", "")
    where = "the operator's input: [attestation] nvidia_service_key: "
    assert refusal(text, measured()) == where + "[operator] credentials refuses it"
    attestation = msgspec.structs.replace(config.attestation, nvidia_service_key="own")
    config = msgspec.structs.replace(config, attestation=attestation)
    assert refusal(text, config) == where + "the measured file has its own"


def test_the_operator_does_not_say_where_a_key_is_sent() -> None:
    with pytest.raises(ConfigError, match=r"unknown key \[attestation\] rim_url"):
        given_input('[attestation]\nrim_url = "https://example.com"\n')
    config = measured(ROOM + 'credentials = "accepted"\n')
    attestation = msgspec.structs.replace(config.attestation, rim_url="http://127.0.0.1:1")
    config = msgspec.structs.replace(config, attestation=attestation)
    text = '[attestation]\nnvidia_service_key = "sealed_nvidia"\n'
    assert refusal(text, config).startswith("[attestation] rim_url: expected https")
