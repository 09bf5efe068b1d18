"""The quality study: train small GPTs that differ in their attention, then report on them.

    python bench/train_ra_mla.py --preset cpu --out runs               # every arm, three seeds
    python bench/train_ra_mla.py --arms baseline ra-composed --seeds 0 --steps 100 --out runs
    python bench/train_ra_mla.py study.toml --out runs --resume        # skip what is done
    torchrun --nproc_per_node 2 bench/train_ra_mla.py --preset h200 --out runs
    python bench/train_ra_mla.py report runs --out study.md
    python bench/train_ra_mla.py --list                                # arms and presets

Each run has a folder below --out, named after arm, R, dtype and seed. bench/PROTOCOL.md says what
is compared and what counts as a difference.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.options import check_outputs
from bench.study.arms import ARMS, count_parameters
from bench.study.probe import NonFiniteError
from bench.study.runlog import LOG, has_ended, read_log
from bench.study.settings import (
    PRESETS,
    RUN_OPTIONS,
    Settings,
    Study,
    make_study,
    read_toml,
)
from bench.study.trainer import train
from bench.study.training import load_data, model_config
from bench.study.world import World, join_world


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if a run met a NaN or an infinity."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "report":
        return _report(argv[1:])
    parser = _parser()
    args = parser.parse_args(argv)
    if args.list:
        print(_listing())
        return 0
    check_outputs(parser, {}, "tqdm")
    try:
        study = _study(args)
        if args.out is None:
            raise ValueError("--out FOLDER is missing: where the runs go")
        with join_world(study.base.device) as world:
            return _run(study, args, world)
    except (ValueError, NotImplementedError, FileNotFoundError) as error:
        parser.error(str(error))


def _study(args: argparse.Namespace) -> Study:
    """Preset, then TOML, then the command line."""
    given = {
        key: value
        for key, value in vars(args).items()
        if value is not None and key not in ("toml", "preset", "out", "list", "resume", "stop_at")
    }
    return make_study(args.preset, read_toml(args.toml) if args.toml else {}, given)


def _run(study: Study, args: argparse.Namespace, world: World) -> int:
    """Every run of the study that is not done; one that is not finite does not stop the others."""
    runs = study.runs()
    folders = [args.out / run.name for run in runs]
    started = [folder.name for folder in folders if (folder / LOG).exists()]
    if started and not args.resume:
        raise ValueError(
            f"{args.out} has {', '.join(started)} already: --resume goes on with what is "
            "unfinished; another --out starts anew"
        )
    todo = [(r, f) for r, f in zip(runs, folders, strict=True) if not has_ended(f)]
    world.wait()  # before rank 0 writes what decides the line above
    say = print if world.leads else lambda *_, **__: None
    say(f"{len(todo)} runs of {len(runs)} to do, in {args.out}")
    corpus, failed = load_data(study.base), False
    for i, (settings, folder) in enumerate(todo):
        try:
            train(
                settings,
                corpus,
                folder,
                world=world,
                stop_at=args.stop_at,
                resume=args.resume,
            )
        except NonFiniteError as error:
            failed = True
            say(f"{settings.name}: {error}", file=sys.stderr)
        if world.leads:
            say(f"[{i + 1}/{len(todo)}] {_summary(folder)}", flush=True)
    return 1 if failed else 0


def _summary(folder: Path) -> str:
    """One line on a run, and its sample if it has ended."""
    lines = read_log(folder)
    first, last = lines[0], lines[-1]
    about = f"{first['name']}: {first['parameters']:,} parameters"
    if abs(first["versus_baseline"]) > 1e-6:
        about += f" ({first['versus_baseline']:+.2%} against the baseline)"
    if last["kind"] == "stop":
        return f"{about}, stopped: {last['reason']}"
    if last["kind"] == "pause":
        return f"{about}, goes on at step {last['step']} with --resume"
    loss = next(line["val_loss"] for line in reversed(lines) if line["kind"] == "eval")
    return (
        f"{about}, validation loss {loss:.4f} nats a token, {last['step_ms']:.1f} ms a step, "
        f"{last['train_seconds']:.0f} s\n{_indented(last['sample'])}"
    )


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def _report(argv: Sequence[str]) -> int:
    """``report RUNS... --out PAGE.md``."""
    parser = argparse.ArgumentParser(prog="train_ra_mla.py report")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of them")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PAGE.md", help=".json and .png go beside it"
    )
    parser.add_argument("--title", default="Quality of reciprocal attention")
    parser.add_argument("--note", default="", help="a paragraph: what departs from the protocol")
    args = parser.parse_args(argv)
    check_outputs(parser, {}, "matplotlib")
    from bench.study.report import write_report

    try:
        if args.out.suffix != ".md":
            raise ValueError(f"--out must be a .md file, got {args.out}")
        if not args.out.parent.is_dir():
            raise FileNotFoundError(f"no such folder: {args.out.parent}")
        print(write_report(args.runs, args.out, args.title, args.note))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    return 0


def _listing() -> str:
    """Arms with their parameters at each preset's sizes, and presets with their runs."""
    lines = ["arms:", *(f"  {name:13} {arm.about}" for name, arm in ARMS.items())]
    lines.append("presets:")
    for name, study in PRESETS.items():
        s = study.base
        lines.append(
            f"  {name:13} {s.n_layer} layers, {s.n_head} heads, {s.n_embd} wide, {s.block} tokens; "
            f"{s.steps} steps of {s.batch}; {len(study.runs())} runs"
        )
        plain = count_parameters("baseline", 0, model_config(s))
        lines.append(f"  {'':13} baseline: {plain:,} parameters; the arms at R=4 against it:")
        for arm in ARMS:
            difference = count_parameters(arm, 4, model_config(s)) / plain - 1
            lines.append(f"  {'':15} {arm:13} {difference:+.2%}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_ra_mla.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("toml", nargs="?", type=Path, metavar="FILE.toml", help="settings; options overrule it")
    add("--preset", choices=PRESETS, help="default cpu")
    add("--arms", nargs="+", metavar="ARM", help=", ".join(ARMS))
    add("--R", nargs="+", type=int, metavar="N", help="reciprocal ranks")
    add("--dtype", nargs="+", metavar="DTYPE", help="fp32, bf16, fp16")
    add("--seeds", nargs="+", type=int, metavar="N")
    add("--out", type=Path, metavar="FOLDER", help="where the runs go")
    add("--resume", action="store_true", help="skip finished runs, go on with unfinished ones")
    add("--stop-at", type=int, metavar="STEP", help="write a checkpoint there and stop")
    add("--list", action="store_true", help="print arms and presets, run nothing")
    for field in dataclasses.fields(Settings):
        if field.name not in RUN_OPTIONS:
            add(f"--{field.name.replace('_', '-')}", **_option(field))
    return parser


def _option(field: Any) -> dict[str, Any]:
    """How argparse reads a setting; its default is the preset's."""
    if field.name in ("data", "val_data"):
        which = "train" if field.name == "data" else "validate"
        return {"nargs": "+", "metavar": "FILE", "help": f"to {which} on: text, or uint16 .bin"}
    if field.type is bool:
        action = argparse.BooleanOptionalAction
        return {"action": action, "default": None, "help": field.metadata["help"]}
    return {"type": field.type, "metavar": "N", "help": field.metadata["help"]}


if __name__ == "__main__":
    sys.exit(main())
