"""The files of a run: ``run.jsonl``, one JSON object a line, and ``checkpoint.pt``.

Lines have a ``kind``: ``run`` (settings, machine, corpus), ``resume``, ``step``, ``eval``,
``pause`` (``--stop-at``), ``stop`` (not finite: where and what) and ``end``. A run has ended, one
way or the other, if its last line says ``stop`` or ``end``.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

LOG, CHECKPOINT = "run.jsonl", "checkpoint.pt"
DIGITS = 9  # of floats in the log


class RunLog:
    """Appends lines to ``folder/run.jsonl``; without a folder (not rank 0) it writes nothing."""

    def __init__(self, folder: Path | None) -> None:
        """Make the folder."""
        self.path = None if folder is None else folder / LOG
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, kind: str, **values: Any) -> None:
        """One line; floats are rounded, and those that are not finite become strings."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"kind": kind, **_plain(values)}) + "\n")

    def start(self, **values: Any) -> None:
        """The first line of a new log."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        self.write("run", **values)

    def go_on(self, step: int) -> None:
        """Forget what happened from ``step`` on: the resumed run writes it again."""
        if self.path is not None:
            kept = [line for line in read_log(self.path.parent) if line.get("step", 0) < step]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.write("resume", step=step - 1)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All whole lines; a last one that was cut off by a crash is left out."""
    lines = []
    for line in (folder / LOG).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def has_ended(folder: Path) -> bool:
    """Whether there is nothing left to do."""
    lines = read_log(folder) if (folder / LOG).exists() else []
    return bool(lines) and lines[-1]["kind"] in ("stop", "end")


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write all or nothing: an interrupted write leaves the checkpoint before."""
    partial = folder / f"{CHECKPOINT}.partial"
    torch.save(state, partial)
    os.replace(partial, folder / CHECKPOINT)


def load_checkpoint(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The state that was saved, on the CPU; None where there is none.

    Raises:
        ValueError: it belongs to a run with other settings.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    old = state["settings"]
    other = [key for key in settings if old.get(key) != settings[key]]
    if other:
        told = ", ".join(f"{key} was {old.get(key)!r}, is {settings[key]!r}" for key in other)
        raise ValueError(f"{path} is of a run with other settings: {told}")
    return state


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    return value
