"""Structured logs on standard error: JSON for the journal, coloured lines on a terminal.

No line ever holds a prompt, a completion, a key or a client's header: callers log names, counts,
durations and ids. The types that hold content have a `repr` without it, as a second wall.
"""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Literal, TextIO, TypeAlias

import structlog

MAX_FRAMES = 20
"""Of a defect; the innermost ones."""

Log: TypeAlias = structlog.typing.FilteringBoundLogger


def configure_log(
    *, format: Literal["auto", "json", "pretty"], level: str, stream: TextIO = sys.stderr
) -> Log:
    """Set up structlog for this process and return the root logger.

    Libraries that use the standard `logging` (Quart, Hypercorn) are sent the same way, at
    warning and above: their lower levels log request lines.
    """
    pretty = format == "pretty" or (format == "auto" and stream.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=stream.isatty())
        if pretty
        else structlog.processors.JSONRenderer(sort_keys=True)
    )
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(file=stream),
        cache_logger_on_first_use=False,
    )
    _send_standard_logging(stream, [*shared, renderer])
    # Bound here: the logger as it comes is a proxy that binds itself anew for each line, also for
    # one below the level, and there is one for each request.
    logger: Log = structlog.get_logger().bind()
    return logger


def describe_defect(error: BaseException) -> dict[str, object]:
    """What may be logged of an exception that nobody foresaw: its type, and where it came from,
    innermost last, as `module:line function`.

    Its text and the values of variables may quote a request, so they are left out.
    """
    frames = [
        f"{frame.f_globals.get('__name__', '?')}:{line} {frame.f_code.co_qualname}"
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    return {"error": type(error).__name__, "where": frames[-MAX_FRAMES:]}


def _send_standard_logging(stream: TextIO, processors: list[structlog.typing.Processor]) -> None:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=processors[:-1],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _without_exception,
                processors[-1],
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)


def _without_exception(
    _logger: object, _name: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """A library's traceback may quote input in its messages: keep the type, drop the text."""
    info = event.pop("exc_info", None)
    if isinstance(info, tuple) and info[0] is not None:
        event["error"] = info[0].__name__
    return event
