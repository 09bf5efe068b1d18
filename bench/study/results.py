"""Runs as read from their logs, and the statistics of the protocol."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bench.study.arms import ARMS
from bench.study.runlog import LOG, read_log
from bench.study.settings import RUN_OPTIONS
from bench.study.training import FREE

BASELINE = "baseline"
# Student's t, 97.5%, for 1, 2, ... degrees of freedom; beyond, the normal's is close enough.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
NORMAL95 = 1.960


@dataclass(frozen=True)
class Run:
    """One run's log.

    Attributes:
        name: the folder's.
        settings: as a dict.
        header: the log's first line.
        evals: its validations, in order.
        end: its last line, if it ended.
        stop: why it was stopped, if it was.
        mfu: median over logged steps.
    """

    name: str
    settings: dict[str, Any]
    header: dict[str, Any]
    evals: list[dict[str, Any]]
    end: dict[str, Any] | None
    stop: str | None
    mfu: float

    @property
    def label(self) -> str:
        """The arm, with R where it has a meaning: ``ra-composed R=4``."""
        arm = self.settings["arm"]
        return f"{arm} R={self.settings['R']}" if ARMS[arm].has_rank else arm

    @property
    def dtype(self) -> str:
        """Of the run."""
        return self.settings["dtype"]

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.settings["seed"]

    @property
    def val_loss(self) -> float:
        """After the last step, in nats a token."""
        return self.evals[-1]["val_loss"]

    @property
    def watched(self) -> list[str]:
        """What its validations watch: ``share``, ``w_std``, ``w_rec``, ``gate``."""
        if not self.evals:
            return []
        gates = dict.fromkeys(name.rpartition(".")[2] for name in self.evals[0]["gate"])
        return [*(["share"] if self.evals[0]["share"] else []), *gates]

    def values(self, what: str, at: int) -> list[float]:
        """All layers' and heads' values of one of :attr:`watched` at a validation."""
        seen = self.evals[at]
        layers = seen["share"] if what == "share" else seen["gate"]
        return [
            value
            for name, values in layers.items()
            if what == "share" or name.rpartition(".")[2] == what
            for value in values
        ]


@dataclass(frozen=True)
class Interval:
    """Mean and half the 95% t-interval of ``values``; half is None for a single value."""

    mean: float
    half: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> "Interval":
        """At least one value."""
        values = tuple(values)
        n = len(values)
        if n < 2:
            return cls(values[0], None, values)
        t = T95[n - 2] if n - 2 < len(T95) else NORMAL95
        return cls(fmean(values), t * stdev(values) / math.sqrt(n), values)

    def verdict(self) -> str:
        """What the protocol calls a paired difference of losses."""
        if not any(self.values):
            return "identical"
        if self.half is None:
            return "one pair, no interval"
        if abs(self.mean) <= self.half:
            return "no difference shown"
        return "lower" if self.mean < 0 else "higher"

    def text(self, digits: int = 4, sign: bool = False) -> str:
        """``-0.0123 ± 0.0045``."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half is None else f"{mean} ± {self.half:.{digits}f}"


@dataclass(frozen=True)
class Results:
    """Comparable runs: finished ones by (label, dtype), and those that were left out."""

    groups: dict[tuple[str, str], list[Run]]
    left_out: list[Run]

    @property
    def runs(self) -> list[Run]:
        """All that finished."""
        return [run for runs in self.groups.values() for run in runs]

    @property
    def dtype(self) -> str:
        """That of most runs."""
        return _main_dtype(self.runs)

    @property
    def on_gpu(self) -> bool:
        """Whether these runs were on one."""
        return self.runs[0].header["environment"]["driver"] != "none"

    def difference(self, key: tuple[str, str], other: tuple[str, str]) -> Interval | None:
        """Final losses of ``key`` minus those of ``other``, seed by seed; None without a pair."""
        pairs = self.pairs(key, other)
        return Interval.of(a.val_loss - b.val_loss for a, b in pairs) if pairs else None

    def pairs(self, key: tuple[str, str], other: tuple[str, str]) -> list[tuple[Run, Run]]:
        """Runs of equal seeds."""
        others = {run.seed: run for run in self.groups.get(other, ())}
        return [(run, others[run.seed]) for run in self.groups[key] if run.seed in others]


def load_results(paths: Sequence[Path]) -> Results:
    """Read every run below ``paths``.

    Raises:
        FileNotFoundError: no such path, or no run below it.
        ValueError: two runs of one name, runs that differ in more than arm, R, seed and dtype, or
            none that finished.
    """
    runs: dict[str, Run] = {}
    for path in paths:
        logs = sorted(path.rglob(LOG))
        if not logs:
            raise FileNotFoundError(f"no run ({LOG}) below {path}")
        for log in logs:
            run = _load(log.parent)
            if run.name in runs:
                raise ValueError(f"two runs are called {run.name}: report them apart")
            runs[run.name] = run
    _check_comparable(list(runs.values()))
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    finished = [run for run in runs.values() if run.end is not None]
    if not finished:
        raise ValueError("no run has finished yet")
    main = _main_dtype(finished)
    for run in sorted(finished, key=lambda run: (run.dtype != main, _order(run))):
        groups[run.label, run.dtype].append(run)
    return Results(dict(groups), [run for run in runs.values() if run.end is None])


def _load(folder: Path) -> Run:
    lines = read_log(folder)
    if not lines or lines[0]["kind"] != "run":
        raise ValueError(f"{folder / LOG} does not start with a line of kind 'run'")
    of_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        of_kind[line["kind"]].append(line)
    steps = sorted(line["mfu"] for line in of_kind["step"])
    return Run(
        name=lines[0]["name"],
        settings=lines[0]["settings"],
        header=lines[0],
        evals=of_kind["eval"],
        end=of_kind["end"][0] if of_kind["end"] else None,
        stop=of_kind["stop"][0]["reason"] if of_kind["stop"] else None,
        mfu=steps[len(steps) // 2] if steps else math.nan,
    )


def _main_dtype(runs: Sequence[Run]) -> str:
    return Counter(run.dtype for run in runs).most_common(1)[0][0]


def _order(run: Run) -> tuple[str, int, int, int]:
    return run.dtype, list(ARMS).index(run.settings["arm"]), run.settings["R"], run.seed


def _check_comparable(runs: Sequence[Run]) -> None:
    """ValueError if more than what a study varies is different."""
    first = runs[0]
    for run in runs[1:]:
        for key, value in first.settings.items():
            if key not in (*RUN_OPTIONS, *FREE) and run.settings.get(key) != value:
                raise ValueError(
                    f"{first.name} and {run.name} differ in {key}: {value!r}, "
                    f"{run.settings.get(key)!r}; report them apart"
                )
        for key in ("fingerprint", "processes"):
            if run.header[key] != first.header[key]:
                raise ValueError(
                    f"{first.name} and {run.name} differ in {key}: {first.header[key]!r}, "
                    f"{run.header[key]!r}; report them apart"
                )
