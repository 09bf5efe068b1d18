"""All that a GPU has to show, in one command: times of layers and training, tests, and a page.

    python bench/gpu.py
    python bench/gpu.py --out results --commit 0123abc        # in a copy without git
    python bench/gpu.py --parts tests ladder --seconds 300

Parts run one after the other, each as a process with a time limit of its own; all of them together
stay within ``--seconds``. A part that fails or times out is reported on the page and in the exit
status, and the others still run: the page is made from what there is.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from bench import record
from bench.harness.options import count, parser_of, resolve_device

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
TOTAL_SECONDS = 1260  # 21 minutes, the page included
GRACE_SECONDS = 15  # for a part to write down what it has, once it is interrupted
WORKERS = max(1, min(15, (os.cpu_count() or 2) - 1))


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: of the part and of the file that it writes.
        command: its arguments, without the one that names the file.
        limit: seconds after which it is interrupted.
        suffix: of its file: ``json``, or ``xml`` of the tests.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    suffix: str = "json"

    def file(self, folder: Path) -> Path:
        """What it writes."""
        return folder / f"{self.name}.{self.suffix}"

    def full_command(self, folder: Path) -> list[str]:
        """With Python in front and the file behind."""
        file = str(self.file(folder))
        return [sys.executable, *self.command, *_output_option(self.suffix, file)]


@dataclass(frozen=True)
class Outcome:
    """How a part ended; ``status`` is ``"ok"`` or says what went wrong."""

    name: str
    status: str
    seconds: float
    note: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if any part failed."""
    parser = _parser()
    args = parser.parse_args(argv)
    resolve_device(parser, args)
    if not args.out.is_dir():
        parser.error(f"--out: no such folder: {args.out}")
    if args.commit:
        os.environ["RA_TRITON_COMMIT"] = args.commit
    folder = Path(tempfile.mkdtemp(prefix="ra_triton-"))
    print(f"the parts' own files: {folder}", flush=True)

    wanted = [part for part in parts(args.device, args.workers) if part.name in args.parts]
    outcomes = run_all(wanted, folder, args.seconds)
    for outcome in outcomes:
        line = f"{outcome.name:16} {outcome.seconds:4.0f} s  {outcome.status}  {outcome.note}"
        print(line.rstrip())
    try:
        files = write_page(wanted, outcomes, folder, args.out)
    except ValueError as error:
        print(f"no page: {error}", file=sys.stderr)
        return 1
    print(*files, sep="\n")
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


def parts(device: str, workers: int) -> list[Part]:
    """What runs on a device; on a CPU as little as shows that the driver works."""
    options = _ON_CPU if device == "cpu" else _ON_GPU
    tests, sweep, lengths, long, peers, ladder, host, decode, training, layers = options
    forward, train = "--pass forward", "--pass train"
    flex = "ra-flex-compiled" if device == "cuda" else ""  # compiles for seconds at each length
    return [
        Part("sweep-forward", _script("sweep", sweep, "--R 0 4 8", forward), 90),
        Part("sweep-train", _script("sweep", sweep, "--R 4", train), 90),
        Part("ladder", _script("ladder", ladder), 120),
        Part("host", _script("host", host), 60),
        Part("lengths-forward", _script("sweep", forward, lengths, flex), 90),
        Part("long-forward", _script("sweep", forward, long), 60),
        Part("peers", _script("peers", peers), 150),
        Part("decode", _script("decode", decode), 60),
        Part("lengths-train", _script("sweep", train, lengths), 60),
        Part("train-speed", _script("train_speed", training), 450),
        Part("host-layers", _script("host", layers), 180),
        Part("tests", _words(f"-m pytest -q -n {workers} {tests}"), 300, "xml"),
    ]


# Options of tests, sweep, sweeps over lengths and over long ones, peers, ladder, host, decode,
# training and stacked layers, in whose place a CPU repeats the short calls.
_ON_GPU = (
    "-m gpu",
    "--device cuda --shape gpt2 --seconds 2",
    *(
        f"--device cuda --stage attention --shape wide-2048 --D 64 128 --T {T} --seconds 0.5 "
        "--providers ra-triton plain-flash plain-cudnn"
        for T in ("1024 2048", "4096 16384")
    ),
    "--device cuda --seconds 0.5",
    "--device cuda --seconds 5",
    "--device cuda --seconds 2",
    "--device cuda --length 4096 65536 --seconds 0.5",
    "--device cuda --limit 400",
    "--device cuda --shape layers --seconds 2",
)
_ON_CPU = (
    "tests/weights/test_layout.py",
    "--device cpu --shape call --seconds 0",
    "--device cpu --stage attention --shape call --T 8 16 --seconds 0",
    "--device cpu --stage attention --shape call --T 32 --seconds 0",
    "--device cpu --seconds 0",
    "--device cpu --shape call --seconds 0",
    "--device cpu --seconds 0",
    "--device cpu --seconds 0 --length 32 --batch 1",
    "--device cpu --seconds 0",
    "--device cpu --seconds 0",
)


def run_all(wanted: Sequence[Part], folder: Path, seconds: float) -> list[Outcome]:
    """Run parts in order, none beyond the end of the time for all."""
    end = time.monotonic() + seconds
    outcomes = []
    for part in wanted:
        left = end - time.monotonic() - GRACE_SECONDS
        if left <= 0:
            outcomes.append(Outcome(part.name, "not run: no time left", 0.0))
            continue
        print(f"\n=== {part.name}", flush=True)
        outcomes.append(run(part, folder, min(part.limit, left)))
    return outcomes


def run(part: Part, folder: Path, limit: float) -> Outcome:
    """Run one part: interrupted at its limit, and killed where it does not heed that."""
    start = time.monotonic()
    process = subprocess.Popen(part.full_command(folder), cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(limit)
        status = "ok" if code == 0 else f"failed: exit status {code}"
    except subprocess.TimeoutExpired:
        _stop(process)
        status = f"stopped after its {limit:.0f} s"
    except BaseException:  # the user's interrupt must not leave a process on the GPU
        _stop(process)
        raise
    seconds = time.monotonic() - start
    note = _counts(part.file(folder)) if part.suffix == "xml" else ""
    return Outcome(part.name, status, seconds, note)


def write_page(
    wanted: Sequence[Part], outcomes: Sequence[Outcome], folder: Path, out: Path
) -> list[Path]:
    """Make the page of what the parts left.

    Raises:
        ValueError: they left no figures, or a file that is cut short.
    """
    run_file = folder / "run.json"
    listing = {"benchmark": "run", "parts": [asdict(outcome) for outcome in outcomes]}
    run_file.write_text(json.dumps(listing))
    figures = [p.file(folder) for p in wanted if p.suffix == "json" and p.file(folder).exists()]
    plots = find_spec("matplotlib") is not None
    if not plots:
        print("no pictures: matplotlib is not installed")
    return record.write(record.Record.of([run_file, *figures]), out, plots)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt, then kill, the process and those that it started."""
    for number, seconds in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _counts(file: Path) -> str:
    """What pytest counted: ``812 tests, 0 failures, 0 errors, 3 skipped``."""
    if not file.exists():
        return "no report"
    suite = ElementTree.parse(file).getroot().find("testsuite")
    if suite is None:
        return "no report"
    return ", ".join(f"{suite.get(n)} {n}" for n in ("tests", "failures", "errors", "skipped"))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _script(name: str, *options: str) -> tuple[str, ...]:
    return (str(BENCH / f"{name}.py"), *_words(" ".join(options)))


def _output_option(suffix: str, file: str) -> list[str]:
    return [f"--junitxml={file}"] if suffix == "xml" else ["--json", file]


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("gpu.py", __doc__)
    names = [part.name for part in parts("cuda", 1)]
    add = parser.add_argument
    add("--parts", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add("--seconds", type=count(1), default=TOTAL_SECONDS, metavar="S", help="for all parts")
    add("--out", type=Path, default=record.RESULTS, metavar="DIR", help="default bench/results")
    add("--commit", metavar="HASH", help="what is measured, where there is no git")
    add("--workers", type=count(1), default=WORKERS, metavar="N", help="processes of the tests")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
