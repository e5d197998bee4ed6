import json
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import logging, sys
from pathlib import Path
from dcnr.adapters import telemetry
sink = telemetry.configure(Path(sys.argv[1]), console=logging.WARNING)
sink.emit("placed", "s1", {"event": "its own field", "why": {"a": "speed"}})
logging.getLogger("dcnr.x").warning("plain %s", "line")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("dcnr.x").exception("failed")
"""


def test_events_and_logs_are_json_lines_and_readable(tmp_path: Path) -> None:
    # In a process of its own: logging is configured once per process.
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "placed"
    assert lines[0]["session"] == "s1"
    assert lines[0]["data"] == {"event": "its own field", "why": {"a": "speed"}}
    assert (lines[1]["event"], lines[1]["level"], lines[1]["logger"]) == ("plain line", "warning", "dcnr.x")
    assert "ZeroDivisionError" in lines[2]["exception"]
    assert re.search(r"^\d\d:\d\d:\d\d  warning  plain line$", run.stderr, re.MULTILINE)
    assert "placed" not in run.stderr, "below the console's level"
    assert "ZeroDivisionError" in run.stderr


def test_the_console_has_one_short_line_per_event(tmp_path: Path) -> None:
    script = SCRIPT.replace("logging.WARNING", "logging.INFO").replace(
        '{"event": "its own field", "why": {"a": "speed"}}',
        '{"vnodes": {f"v{i}": "p" for i in range(100)}, "peer": "ab" * 32, "loss": 0.123456789, "why": {"a": "b" * 99}}',
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    first = run.stderr.splitlines()[0]
    assert first[8:] == (
        "  placed  session=s1  vnodes={100 entries}  peer=abababababab  loss=0.123457  "
        "why={a: bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb..}"
    )
    whole = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert len(whole["data"]["vnodes"]) == 100
