"""Logs of a process: JSON lines in its home, readable lines on stderr.

Only the composition root calls :func:`configure`; all other code writes to ``logging.getLogger(__name__)``.
"""

from __future__ import annotations

import logging
import logging.handlers
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import structlog

_TEXT_MOST = 60
_ENTRIES_MOST = 3
_HEXADECIMAL = re.compile(r"[0-9a-f]+")
_FILE_BYTES = 16 << 20
_FILES_KEPT = 2

events = structlog.stdlib.get_logger("dcnr.events")


class LogSink:
    """An :class:`~dcnr.runtime.ports.EventSink`: the event log as structured log lines."""

    def emit(self, kind: str, session: str | None, data: Mapping[str, Any]) -> None:
        # Nested, because an event's own fields may be called like the log's (``event``, ``level``).
        events.info(kind, session=session, data=dict(data))


def configure(home: Path, console: int) -> LogSink:
    """Send every log line to ``home/log.jsonl`` (two old files of 16 MiB kept), from level ``console`` on to stderr too."""
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    strip = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    file = logging.handlers.RotatingFileHandler(
        home / "log.jsonl", maxBytes=_FILE_BYTES, backupCount=_FILES_KEPT, delay=True
    )
    file.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[strip, structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)],
        )
    )
    stderr = logging.StreamHandler()
    stderr.setLevel(console)
    stderr.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[strip, structlog.processors.format_exc_info, _line],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [file, stderr]
    root.setLevel(logging.INFO)
    return LogSink()


def in_short(data: Mapping[str, Any]) -> str:
    """An event's fields on one readable line; the whole of them is in ``log.jsonl`` and in ``dcnr events --json``."""
    return "  ".join(f"{name}={value if name == 'reason' else _short(value)}" for name, value in data.items())


def _short(value: Any) -> str:
    match value:
        case bool() | int() | None:
            return str(value)
        case float():
            return f"{value:.6g}"
        case str() if len(value) in (32, 64) and _HEXADECIMAL.fullmatch(value):
            return value[:12]
        case str():
            return value if len(value) <= _TEXT_MOST else f"{value[: _TEXT_MOST - 2]}.."
        case Mapping() if len(value) > _ENTRIES_MOST:
            return f"{{{len(value)} entries}}"
        case Mapping():
            return "{" + ", ".join(f"{_short(key)}: {_short(inner)}" for key, inner in value.items()) + "}"
        case list() | tuple() if len(value) > _ENTRIES_MOST:
            return f"[{len(value)} items]"
        case list() | tuple():
            return "[" + ", ".join(map(_short, value)) + "]"
        case _:
            return _short(str(value))


def _line(_logger: Any, _method: str, entry: MutableMapping[str, Any]) -> str:
    """``07:54:12  warning  what  fields``; a traceback below."""
    clock = str(entry.pop("timestamp", ""))[11:19]
    level, what = entry.pop("level", ""), entry.pop("event", "")
    exception = entry.pop("exception", None)
    entry.pop("logger", None)
    session, data = entry.pop("session", None), entry.pop("data", None)
    fields = ({"session": session} if session else {}) | dict(entry) | (data or {})
    words = [clock, *([level] if level not in ("info", "debug") else []), what, in_short(fields)]
    line = "  ".join(word for word in words if word)
    return f"{line}\n{exception}" if exception else line
