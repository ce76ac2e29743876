"""The runs of a folder: `runs.jsonl`, one line a run, and `curves.jsonl.xz`, by its key the curve to five digits."""

import json
import lzma
import os
import threading
from typing import Any

RUNS = "runs.jsonl"
CURVES = "curves.jsonl.xz"

_lock = threading.Lock()


def load(folder: str) -> list[dict[str, Any]]:
    """Return the runs of a folder, without their curves."""
    return [json.loads(line) for line in _read(os.path.join(folder, RUNS)).splitlines()]


def load_curves(folder: str) -> dict[str, list[dict[str, Any]]]:
    """Return the curves of a folder, by the keys of their runs: the logs of each, in order."""
    packed = _read(os.path.join(folder, CURVES))
    lines = [json.loads(line) for line in lzma.decompress(packed).splitlines()] if packed else []
    return {line["key"]: line["curve"] for line in lines}


def append(folder: str, run: dict[str, Any], curve: list[dict[str, Any]]) -> None:
    """Add a run, from any thread; killed half way, it leaves both files as they were, or a curve too many."""
    os.makedirs(folder, exist_ok=True)
    # Curves are only drawn, and full precision would more than double the file.
    rounded = [
        {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in entry.items()}
        for entry in curve
    ]
    with _lock:
        curves = load_curves(folder) | {run["key"]: rounded}
        lines = [_line({"key": key, "curve": one}) for key, one in curves.items()]
        _replace(os.path.join(folder, CURVES), lzma.compress(b"".join(lines), preset=9 | lzma.PRESET_EXTREME))
        path = os.path.join(folder, RUNS)
        _replace(path, _read(path) + _line(run))


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _read(path: str) -> bytes:
    if not os.path.exists(path):
        return b""
    with open(path, "rb") as file:
        return file.read()


def _replace(path: str, content: bytes) -> None:
    with open(path + ".part", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)
