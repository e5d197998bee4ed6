"""Logs of a process: JSON lines in its home, readable lines on stderr.

Only the composition root calls :func:`configure`; all other code writes to ``logging.getLogger(__name__)``.
"""

from __future__ import annotations

import logging
import logging.handlers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

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
            processors=[strip, structlog.dev.ConsoleRenderer(colors=False)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [file, stderr]
    root.setLevel(logging.INFO)
    return LogSink()
