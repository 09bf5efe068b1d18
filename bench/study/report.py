"""The page of a study: Markdown, with its figures as JSON and its curves as PNG beside it."""

import json
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

from bench.study.figure import draw
from bench.study.results import BASELINE, Interval, Results, Run, load_results

WIDTH = 100
FUNCTION_CLASS = """\
Packed reciprocal attention is plain attention with other projection weights. A free W_fused (`ra`,
`ra-tied-init`) has the baseline's function class, so a difference there comes from initialisation
and optimisation alone. `ra` starts from the baseline's very numbers: it is an A/A control."""
READING = """\
Difference: arm minus baseline of the same seed, mean ± 95% t-interval; negative is better. \
"lower" or "higher" only where the interval excludes zero. {seeds} seed{s}: {width} \
Intervals are not corrected for the number of comparisons ({count}): at 95%, about one in twenty \
excludes zero by chance. Times are medians over steps, least over seeds; {memory}"""
NO_MEMORY = "memory is compared on GPUs only, as a CPU process keeps what earlier runs left in it."
GPU_MEMORY = "memory is the peak of allocated tensors."


def write_report(paths: list[Path], page: Path, title: str, note: str = "") -> str:
    """Write ``page`` (.md), and ``.json`` and ``.png`` of the same name.

    Args:
        paths: run folders, or folders of them.
        page: the Markdown file.
        title: its heading.
        note: a paragraph below the heading: what departs from the protocol.

    Returns:
        The page's text.

    Raises:
        FileNotFoundError: no run there.
        ValueError: runs that cannot be compared, or none that finished.
    """
    results = load_results(paths)
    figure = page.with_suffix(".png")
    draw(results, figure, title)
    parts = [
        f"# {title}",
        fill(note, WIDTH),
        _conditions(results),
        FUNCTION_CLASS,
        "## Validation loss",
        _arm_table(results),
        _reading(results),
        f"![curves]({figure.name})",
        _rank_section(results),
        _dtype_section(results),
        _watch_section(results),
        _left_out(results),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    page.write_text(text)
    page.with_suffix(".json").write_text(_json(results))
    return text


def _conditions(results: Results) -> str:
    """Machine, versions, sizes, budget, corpus."""
    header, s = results.runs[0].header, results.runs[0].settings
    env = header["environment"]
    threads = f", {env['threads']} thread(s)" if env["driver"] == "none" else ""
    driver = "" if env["driver"] == "none" else f", driver {env['driver']}"
    epochs = s["steps"] * s["batch"] * s["block"] / header["train_tokens"]
    pieces = f"{s['val_pieces']} pieces of {header['val_tokens']:,} tokens"
    return "\n".join(
        [
            f"- {env['device']}{threads}{driver}; torch {env['torch']}, triton {env['triton']}, "
            f"ptxas {env['ptxas']}, Python {env['python']}, commit {env['commit']}; "
            f"{header['processes']} process(es)",
            f"- {s['n_layer']} layers, {s['n_head']} heads, {s['n_embd']} wide, {s['block']} "
            f"tokens, vocabulary {s['vocab_size']}; {s['steps']} steps of {s['batch']} sequences, "
            f"learning rate {s['lr']:g} after {s['warmup']} steps of warm-up, dropout "
            f"{s['dropout']:g}, backend {s['backend']}, compile {s['compile']}",
            f"- corpus: {header['corpus']}, {header['train_tokens']:,} tokens ({epochs:.2g} times "
            f"through), fingerprint {header['fingerprint']}; validation on {pieces}",
            "- analysis: `bench/PROTOCOL.md`; figures: the `.json` beside this page",
        ]
    )


def _arm_table(results: Results) -> str:
    of_bytes = all(run.evals[-1]["bits_per_byte"] is not None for run in results.runs)
    head = [
        *("arm", "dtype", "seeds", "parameters", "validation loss, nats a token"),
        *(["bits per byte"] if of_bytes else []),
        *("difference to baseline", "by seed", "verdict", "ms a step", "MFU"),
        *(["memory, MB"] if results.on_gpu else []),
    ]
    rows = []
    for (label, dtype), runs in results.groups.items():
        loss = Interval.of(run.val_loss for run in runs)
        memory = [_end(run)["memory_mb"] for run in runs]
        bits = [run.evals[-1]["bits_per_byte"] for run in runs]
        difference = None
        if label != BASELINE:
            difference = results.difference((label, dtype), (BASELINE, dtype))
        rows.append(
            [
                label,
                dtype,
                ", ".join(str(run.seed) for run in runs),
                f"{runs[0].header['parameters']:,} ({runs[0].header['versus_baseline']:+.2%})",
                loss.text(),
                *([f"{fmean(bits):.4f}"] if of_bytes else []),
                *_difference_cells(difference),
                f"{min(_end(run)['step_ms'] for run in runs):.1f}",
                f"{max(run.mfu for run in runs):.0%}",
                *([f"{max(memory):.0f}"] if results.on_gpu else []),
            ]
        )
    return _table(head, rows)


def _difference_cells(difference: Interval | None) -> list[str]:
    if difference is None:
        return ["", "", ""]
    by_seed = " ".join(f"{value:+.4f}" for value in difference.values)
    return [difference.text(sign=True), by_seed, difference.verdict()]


def _reading(results: Results) -> str:
    seeds = max(len(runs) for runs in results.groups.values())
    compared = sum(label != BASELINE for label, _ in results.groups)
    width = {
        1: "no interval can be given, so no difference can be claimed.",
        2: "the interval is 9 standard deviations wide to each side and shows next to nothing.",
        3: "the interval is wide (2.5 standard deviations to each side).",
    }.get(seeds, "see the protocol for what such an interval can show.")
    plural = "" if seeds == 1 else "s"
    memory = GPU_MEMORY if results.on_gpu else NO_MEMORY
    text = READING.format(seeds=seeds, s=plural, width=width, count=compared, memory=memory)
    return fill(text, WIDTH)


def _rank_section(results: Results) -> str:
    """Each arm at its higher ranks minus the same at its lowest."""
    ranks: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for (label, dtype), runs in results.groups.items():
        if "R=" in label:
            settings = runs[0].settings
            ranks.setdefault((settings["arm"], dtype), []).append((settings["R"], label))
    rows = []
    for (arm, dtype), of_arm in ranks.items():
        (low, low_label), *rest = sorted(of_arm)
        for high, high_label in rest:
            difference = results.difference((high_label, dtype), (low_label, dtype))
            row = [arm, dtype, f"R={high} minus R={low}", *_difference_cells(difference)]
            rows.append(row)
    head = ["arm", "dtype", "", "difference", "by seed", "verdict"]
    return f"## Rank\n\n{_table(head, rows)}" if rows else ""


def _dtype_section(results: Results) -> str:
    """Each arm in another dtype minus the same in the study's main one."""
    main = results.dtype
    rows = []
    for label, dtype in results.groups:
        if dtype != main and (label, main) in results.groups:
            difference = results.difference((label, dtype), (label, main))
            rows.append([label, f"{dtype} minus {main}", *_difference_cells(difference)])
    head = ["arm", "", "difference", "by seed", "verdict"]
    return f"## Precision\n\n{_table(head, rows)}" if rows else ""


def _watch_section(results: Results) -> str:
    """Gates and shares at the first and last validation: mean (least to largest)."""
    rows = []
    for (label, dtype), runs in results.groups.items():
        for what in runs[0].watched:
            first, last = ([v for run in runs for v in run.values(what, at)] for at in (0, -1))
            rows.append([label, dtype, what, _spread(first), _spread(last)])
    if not rows:
        return ""
    head = ["arm", "dtype", "", "first step", "last step"]
    about = fill(
        "Over layers, heads and seeds: mean (least to largest). The reciprocal share is the part "
        "of the scores' variance over keys that the last R lanes make; `gate` is a sigmoid, "
        "averaged over tokens.",
        WIDTH,
    )
    return f"## Gates and reciprocal share\n\n{about}\n\n{_table(head, rows)}"


def _left_out(results: Results) -> str:
    lines = [
        f"- {run.name}: {'stopped, ' + run.stop if run.stop else 'not finished'}"
        for run in results.left_out
    ]
    return "\n".join(["## Left out", "", *lines]) if lines else ""


def _json(results: Results) -> str:
    """Every figure of the page: one object a run."""
    first = results.runs[0].header
    head: dict[str, Any] = {key: first[key] for key in ("environment", "settings", "fingerprint")}
    runs = [json.dumps(_run_figures(run)) for run in [*results.runs, *results.left_out]]
    body = ",\n".join(runs)
    return json.dumps(head)[:-1] + f',\n"runs": [\n{body}\n]}}\n'


def _run_figures(run: Run) -> dict[str, Any]:
    end = run.end or {}
    return {
        "name": run.name,
        **{key: run.settings[key] for key in ("arm", "R", "dtype", "seed")},
        "parameters": run.header["parameters"],
        "commit": run.header["environment"]["commit"],
        "status": "finished" if run.end else run.stop or "not finished",
        "val_loss": run.val_loss if run.end else None,
        "step_ms": end.get("step_ms"),
        "memory_mb": end.get("memory_mb"),
        "mfu": round(run.mfu, 4),
        "curve": [[line["step"], round(line["val_loss"], 6)] for line in run.evals],
        "watched": {
            what: [round(fmean(run.values(what, at)), 5) for at in range(len(run.evals))]
            for what in (run.watched)
        },
    }


def _end(run: Run) -> dict[str, Any]:
    assert run.end is not None  # only finished runs are in groups
    return run.end


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
