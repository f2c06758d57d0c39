"""The tree of errors is complete, consistent, and the one its docstring draws."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

import appliance.errors
from appliance.errors import (
    EX_CONFIG,
    EX_NOPERM,
    EX_OSERR,
    EX_SOFTWARE,
    EX_UNAVAILABLE,
    ApplianceError,
    BootError,
    ConfigError,
    EngineDied,
    EngineExposed,
    EngineHung,
    EngineRefused,
    EngineStartFailed,
    InternalError,
    ListenError,
    Malformed,
    ModelError,
    leaves,
)


def descendants(kind: type[ApplianceError]) -> Iterator[type[ApplianceError]]:
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


CLASSES = list(descendants(ApplianceError))
LEAVES = [kind for kind in CLASSES if not kind.__subclasses__()]

every_leaf = pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)


def drawn_tree() -> dict[str, str]:
    """Child to parent, from the drawing in the module's docstring."""
    parents: dict[str, str] = {}
    path = ["ApplianceError"]
    for line in (appliance.errors.__doc__ or "").splitlines():
        if branch := re.match(r"    ((?:│   |    )*)[├└]── ((?:[A-Z][A-Za-z]+ *)+)", line):
            del path[len(branch[1]) // 4 + 1 :]
            names = branch[2].split()
            parents |= dict.fromkeys(names, path[-1])
            path.append(names[0])
    return parents


def test_the_drawn_tree_is_the_tree_of_classes() -> None:
    assert drawn_tree() == {kind.__name__: kind.__bases__[0].__name__ for kind in CLASSES}


@every_leaf
def test_every_leaf_has_a_code_of_its_own(leaf: type[ApplianceError]) -> None:
    assert "code" in vars(leaf) or leaf is InternalError  # what the root says is about defects
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", leaf.code)
    assert [other for other in LEAVES if other.code == leaf.code] == [leaf]


@every_leaf
def test_every_leaf_has_advice_in_one_sentence(leaf: type[ApplianceError]) -> None:
    if leaf not in (InternalError, BootError):  # the root's is for defects; a cause brings its own
        assert leaf.advice != ApplianceError.advice
    assert re.fullmatch(r"[A-Z][^\n]*\.", leaf.advice)
    assert re.fullmatch(r"[A-Z][^\n]*\.", leaf.client)


@every_leaf
def test_every_leaf_has_a_status_that_says_whose_fault_it_is(leaf: type[ApplianceError]) -> None:
    clients = leaf.type != "server_error"
    if leaf is not EngineRefused:  # its status is the engine's
        assert leaf.http_status // 100 == (4 if clients else 5)
    assert leaf.exit_status in {EX_CONFIG, EX_NOPERM, EX_OSERR, EX_SOFTWARE, EX_UNAVAILABLE}
    assert re.fullmatch(r"(invalid_request|authentication|rate_limit|server)_error", leaf.type)


@pytest.mark.parametrize(
    ("leaf", "status"),
    [
        (ConfigError, 78),
        (ModelError, 78),
        (ListenError, 71),
        (EngineStartFailed, 69),
        (EngineExposed, 69),
        (EngineDied, 70),
        (EngineHung, 70),
    ],
)
def test_exit_statuses_are_the_ones_that_dcv_serve_documents(
    leaf: type[ApplianceError], status: int
) -> None:
    assert leaf.exit_status == status


def test_a_message_is_what_the_error_says() -> None:
    error = ConfigError("no", param="p", retry_after_s=3)
    assert (str(error), error.message, error.param, error.retry_after_s) == ("no", "no", "p", 3)


def test_a_boot_error_takes_after_its_cause() -> None:
    cause = ListenError("port 1: taken")
    error = BootError(10, "listener", cause)
    assert error.message == "stage 10 (listener): port 1: taken"
    assert (error.exit_status, error.advice) == (cause.exit_status, cause.advice)
    assert (error.http_status, error.code) == (503, "boot_failed")


@pytest.mark.parametrize(
    ("field", "param"),
    [("$", None), ("$.choices", "choices"), ("$.a[0].b", "a[0].b")],
)
def test_a_malformed_fields_path_is_the_openai_param(field: str, param: str | None) -> None:
    error = Malformed("no", field=field, offset=3)
    assert (error.field, error.param, error.offset) == (field, param, 3)


def test_a_refusal_keeps_the_engines_status() -> None:
    assert EngineRefused("no", http_status=413).http_status == 413
    assert EngineRefused("no", http_status=400).http_status == 400


def test_the_leaves_of_a_group_are_what_it_consists_of_however_nested() -> None:
    one, two, three = ValueError("1"), KeyboardInterrupt(), ConfigError("3")
    group = BaseExceptionGroup(
        "a", [one, BaseExceptionGroup("b", [two, ExceptionGroup("c", [three])])]
    )
    assert leaves(group) == [one, two, three]
    assert leaves(one) == [one]
    assert leaves(None) == []
