"""The picture of a study: losses, differences, precision, gates and reciprocal shares."""

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.study.arms import ARMS
from bench.study.results import BASELINE, Results, Run

Key = tuple[str, str]
STYLES = ("-", "--", ":", "-.")
MARKERS = ("", "x", "+", "*")


def draw(results: Results, path: Path, title: str) -> None:
    """Write a PNG: colour is the arm; the line's style is R, and in the precision panel dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(17, 9.5), layout="constrained")
    env = results.runs[0].header["environment"]
    seeds = max(len(runs) for runs in results.groups.values())
    figure.suptitle(
        f"{title}\n{env['device']}, torch {env['torch']}, commit {env['commit']}; "
        f"means over {seeds} seed(s), {results.dtype}",
        fontsize=10,
    )
    main = {key: runs for key, runs in results.groups.items() if key[1] == results.dtype}
    _losses(axes[0][0], results, list(main))
    _difference_curves(axes[0][1], results, list(main))
    _final_differences(axes[0][2], results)
    _precision(axes[1][0], results)
    _watched(axes[1][1], main, lambda what: what != "share", "gates, mean over layers and heads")
    _watched(axes[1][2], main, lambda what: what == "share", "reciprocal share of the scores")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _losses(axis: Any, results: Results, keys: list[Key]) -> None:
    for key in keys:
        steps, losses = _mean_curve(results.groups[key], lambda line: line["val_loss"])
        axis.plot(steps, losses, **_look(results, key), label=key[0])
    axis.set(title="validation loss", xlabel="step", ylabel="nats a token")
    _after_the_fall(axis)
    _finish(axis)


def _difference_curves(axis: Any, results: Results, keys: list[Key]) -> None:
    """Mean over seeds of arm minus baseline, where the warm-up no longer hides it."""
    for key in keys:
        pairs = results.pairs(key, (BASELINE, key[1]))
        if key[0] == BASELINE or not pairs:
            continue
        curves = [
            [a["val_loss"] - b["val_loss"] for a, b in zip(run.evals, base.evals, strict=True)]
            for run, base in pairs
        ]
        steps = [line["step"] for line in pairs[0][0].evals]
        means = [fmean(values) for values in zip(*curves, strict=True)]
        axis.plot(steps, means, **_look(results, key), label=key[0])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(title="difference to the baseline", xlabel="step", ylabel="nats a token")
    _finish(axis)


def _final_differences(axis: Any, results: Results) -> None:
    """Mean and 95% t-interval, a dot for each seed."""
    keys = [key for key in results.groups if key[0] != BASELINE]
    names: list[str] = []
    for key in keys:
        difference = results.difference(key, (BASELINE, key[1]))
        if difference is None:
            continue
        y, colour = len(names), _look(results, key)["color"]
        names.append(f"{key[0]} {key[1]}")
        axis.errorbar(
            difference.mean, y, xerr=difference.half, fmt="s", color=colour, capsize=4, markersize=5
        )
        axis.plot(difference.values, [y] * len(difference.values), ".", color="black", markersize=4)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set(
        title="after the last step: 95% interval, seeds", xlabel="nats a token; left is better"
    )
    axis.grid(alpha=0.3)


def _precision(axis: Any, results: Results) -> None:
    """Arms that ran in more than one dtype."""
    dtypes = sorted({dtype for _, dtype in results.groups})
    for label in dict.fromkeys(label for label, _ in results.groups):
        keys = [(label, dtype) for dtype in dtypes if (label, dtype) in results.groups]
        for key in keys if len(keys) > 1 else ():
            steps, losses = _mean_curve(results.groups[key], lambda line: line["val_loss"])
            look = {**_look(results, key), "linestyle": STYLES[dtypes.index(key[1]) % 4]}
            axis.plot(steps, losses, **look, label=" ".join(key))
    axis.set(title="precision: validation loss", xlabel="step", ylabel="nats a token")
    _after_the_fall(axis)
    _finish(axis)


def _watched(
    axis: Any, groups: dict[Key, list[Run]], wanted: Callable[[str], bool], title: str
) -> None:
    for (label, _), runs in groups.items():
        for i, what in enumerate(w for w in runs[0].watched if wanted(w)):
            curve = [
                fmean(v for run in runs for v in run.values(what, at))
                for at in range(len(runs[0].evals))
            ]
            steps = [line["step"] for line in runs[0].evals]
            colour = f"C{list(ARMS).index(runs[0].settings['arm'])}"
            rank = _rank_index(groups, runs[0])
            look = {"linestyle": STYLES[(rank if what == "share" else i) % 4]}
            look["marker"] = MARKERS[rank % 4]
            axis.plot(steps, curve, color=colour, **look, label=f"{label} {what}")
    axis.set(title=title, xlabel="step")
    _finish(axis)


def _mean_curve(
    runs: list[Run], value: Callable[[dict[str, Any]], float]
) -> tuple[list[int], list[float]]:
    steps = [line["step"] for line in runs[0].evals]
    return steps, [fmean(value(run.evals[i]) for run in runs) for i in range(len(steps))]


def _look(results: Results, key: Key) -> dict[str, Any]:
    """Colour by arm, style by R, a marker at each validation."""
    run = results.groups[key][0]
    return {
        "color": f"C{list(ARMS).index(run.settings['arm'])}",
        "linestyle": STYLES[_rank_index(results.groups, run) % 4],
        "marker": ".",
        "markersize": 4,
    }


def _rank_index(groups: dict[Key, list[Run]], run: Run) -> int:
    """0 for the lowest R of the study and for arms without one, 1 for the next."""
    ranks = sorted({r.settings["R"] for runs in groups.values() for r in runs} - {0})
    return ranks.index(run.settings["R"]) if run.settings["R"] in ranks else 0


def _after_the_fall(axis: Any) -> None:
    """Leave out the untrained model's loss, beside which no difference shows."""
    values = [v for line in axis.get_lines() for v in list(line.get_ydata())[1:]]
    if values:
        margin = 0.1 * (max(values) - min(values)) or 0.1
        axis.set_ylim(min(values) - margin, max(values) + margin)


def _finish(axis: Any) -> None:
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)
    else:
        axis.text(0.5, 0.5, "not in these runs", ha="center", transform=axis.transAxes)
