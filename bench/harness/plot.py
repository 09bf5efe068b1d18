"""Pictures of sweeps, ladders and peers: time, and TFLOP/s."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.harness.report import OK, Row
from bench.harness.shapes import PHASES

LINE_STYLES = ("-", "--", ":", "-.")
FIELDS = ("provider", "shape", "D", "R", "T")


def plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Write a PNG (or what the suffix says); provider = colour, other sizes = line style.

    A row of panels over T, and one over R, where there is more than one of them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if row.status == OK and row.ms]
    varying = [size for size in ("T", "R") if len({getattr(row, size) for row in measured}) > 1]
    sizes = varying or ["T"]
    shape: dict[str, Any] = {"figsize": (13, 4.8 * len(sizes)), "squeeze": False}
    figure, axes = pyplot.subplots(len(sizes), 2, layout="constrained", **shape)
    figure.suptitle(title, fontsize=9)
    on_gpu = any(row.graph_ms for row in measured)
    for (left, right), size in zip(axes, sizes, strict=True):
        series = _series(measured, size)
        _lines(left, series, size, "ms")
        _lines(right, series, size, "tflops")
        left.set(ylabel="eager ms" if on_gpu else "ms")
        right.set(ylabel="TFLOP/s, graph replay" if on_gpu else "TFLOP/s")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_ladder(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Write one panel per phase: a bar per rung and mode, from p20 to p80 a whisker."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if row.status == OK and row.ms]
    phases = list(dict.fromkeys(row.phase for row in measured)) or ["forward"]
    names = list(dict.fromkeys(row.provider for row in rows))
    figure, axes = pyplot.subplots(1, len(phases), figsize=(13, 6), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for axis, phase in zip([axes] if len(phases) == 1 else axes, phases, strict=True):
        of_phase = [row for row in measured if row.phase == phase]
        for offset, mode in ((-0.2, ""), (0.2, "graph_")):
            _bars(axis, of_phase, names, offset, mode)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.set(title=PHASES[phase], xlabel="ms")
        axis.grid(alpha=0.3, axis="x")
        if of_phase:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_peers(path: Path, title: str, rows: Sequence[Any]) -> None:
    """Write one panel per phase: for each case a bar per provider, whose colour it keeps.

    Args:
        path: of the picture.
        title: above the panels.
        rows: of ``peers.py``; those without a time have no bar.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if row.tflops]
    phases, cases, names = (
        list(dict.fromkeys(getattr(row, field) for row in measured))
        for field in ("phase", "case", "provider")
    )
    shape: dict[str, Any] = {"figsize": (13, 1 + 2.7 * len(phases)), "squeeze": False}
    figure, axes = pyplot.subplots(max(1, len(phases)), 1, layout="constrained", **shape)
    figure.suptitle(title, fontsize=9)
    width = 0.84 / max(1, len(names))
    for (axis,), phase in zip(axes, phases, strict=False):
        for i, name in enumerate(names):
            mine = [row for row in measured if (row.phase, row.provider) == (phase, name)]
            places = [cases.index(row.case) + (i - (len(names) - 1) / 2) * width for row in mine]
            axis.bar(places, [row.tflops for row in mine], 0.9 * width, color=f"C{i}", label=name)
        axis.set_xticks(range(len(cases)), cases, fontsize=8)
        axis.set(title=phase, ylabel="TFLOP/s")
        axis.grid(alpha=0.3, axis="y")
    if measured:
        axes[0, 0].legend(fontsize=7, ncols=len(names), loc="upper left")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(axis: Any, rows: Sequence[Row], names: list[str], offset: float, mode: str) -> None:
    """The bars of one mode: ``""`` is eager, ``"graph_"`` a graph's replay."""
    rows = [row for row in rows if getattr(row, f"{mode}ms") is not None]
    if not rows:
        return
    middle, low, high = (
        [getattr(row, f"{mode}{field}") for row in rows] for field in ("ms", "ms_p20", "ms_p80")
    )
    whiskers = [
        [max(0.0, m - p) for m, p in zip(middle, low, strict=True)],
        [max(0.0, p - m) for m, p in zip(middle, high, strict=True)],
    ]
    label = "CUDA graph" if mode else "eager"
    places = [names.index(row.provider) + offset for row in rows]
    axis.barh(places, middle, 0.36, xerr=whiskers, label=label, error_kw={"linewidth": 0.8})


def _series(rows: Sequence[Row], size: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that differ in ``size`` only, as lines; single points only where there is no line."""
    fields = [field for field in FIELDS if field != size]

    def key(row: Row) -> tuple[Any, ...]:
        # Over T, the batch shrinks along: B * T is what such a line has in common.
        return (*(getattr(row, field) for field in fields), row.B * row.T)

    ordered = sorted(rows, key=lambda row: (key(row), getattr(row, size)))
    groups = {k: list(group) for k, group in groupby(ordered, key)}
    longer = {k: group for k, group in groups.items() if len(group) > 1}
    return longer or groups


def _lines(axis: Any, series: dict[tuple[Any, ...], list[Row]], size: str, value: str) -> None:
    """One line per series; labels name only what differs between the series."""
    fields = [field for field in FIELDS if field != size]
    varying = [i for i, _ in enumerate(fields) if len({key[i] for key in series}) > 1]
    providers = sorted({key[0] for key in series})
    styles = sorted({key[1:] for key in series})
    for key, rows in series.items():
        sizes = [f"{fields[i]}={key[i]}" for i in varying if i > 0]
        axis.plot(
            [getattr(row, size) for row in rows],
            [getattr(row, value) for row in rows],
            marker="o",
            markersize=3,
            color=f"C{providers.index(key[0])}",
            linestyle=LINE_STYLES[styles.index(key[1:]) % len(LINE_STYLES)],
            label=" ".join([key[0], *sizes]),
        )
    if size == "T":
        axis.set_xscale("log", base=2)
    ticks = sorted({getattr(row, size) for rows in series.values() for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set(xlabel=size)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if series:
        axis.legend(fontsize=7)
