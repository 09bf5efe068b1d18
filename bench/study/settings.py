"""What a run is (``Settings``), what a study is (``Study``: groups of runs), presets and TOML.

A preset is changed by a TOML file, and both by the command line:

    preset = "cpu"
    steps = 300
    seeds = [0, 1]
    arms = ["baseline", "ra-composed"]
    R = [4, 8]
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.study.arms import ARMS, RECIPROCAL
from ra_triton.backend import CHOICES

DTYPES = ("fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")


def _setting(default: Any, about: str) -> Any:
    return field(default=default, metadata={"help": about})


@dataclass(frozen=True)
class Settings:
    """One run. Every field is an option of the command line and a key of the TOML file."""

    arm: str = "baseline"
    R: int = 4
    seed: int = 0
    dtype: str = "fp32"
    n_layer: int = _setting(3, "blocks")
    n_head: int = _setting(3, "heads a block")
    n_embd: int = _setting(96, "channels")
    block: int = _setting(128, "tokens a sequence")
    bias: bool = _setting(False, "biases in linear layers and norms")
    dropout: float = _setting(0.0, "probability")
    vocab_size: int = _setting(256, "rows of the embedding; 256 for bytes")
    steps: int = _setting(600, "optimizer steps")
    batch: int = _setting(8, "sequences a step, over all processes")
    micro_batch: int = _setting(0, "sequences a forward pass of one process; 0: all at once")
    lr: float = _setting(2e-3, "highest learning rate")
    min_lr: float = _setting(0.1, "of the highest, where the cosine ends")
    warmup: int = _setting(60, "steps of linear warm-up")
    weight_decay: float = _setting(0.1, "of matrices")
    clip: float = _setting(1.0, "largest norm of the gradient; 0: no clipping")
    eval_every: int = _setting(100, "steps between validations")
    val_pieces: int = _setting(256, "sequences of validation, the same in every run")
    log_every: int = _setting(10, "steps between lines of the log")
    checkpoint_every: int = _setting(0, "steps between checkpoints; 0: only where a run stops")
    keep_model: bool = _setting(False, "keep the checkpoint of a finished run")
    corpus_bytes: int = _setting(4_000_000, "of the standard library, where no data are named")
    data: tuple[str, ...] = ()
    val_data: tuple[str, ...] = ()
    device: str = _setting("auto", "auto, cpu or cuda")
    threads: int = _setting(0, "of PyTorch on a CPU; 0: its own choice")
    backend: str = _setting("auto", f"of ra_triton: {', '.join(CHOICES)}")
    compile: bool = _setting(False, "torch.compile the model")
    prompt: str = _setting("def ", "where the sample starts")
    sample: int = _setting(200, "tokens to draw at the end")

    @property
    def name(self) -> str:
        """A folder's name: ``ra-composed-R4-fp32-s0``."""
        rank = f"-R{self.R}" if ARMS[self.arm].has_rank else ""
        return f"{self.arm}{rank}-{self.dtype}-s{self.seed}"

    def check(self) -> None:
        """Raise what the command line should say before anything runs.

        Raises:
            ValueError: an unknown choice, a size out of range, sizes that do not fit.
        """
        for name, choices in (("dtype", DTYPES), ("device", DEVICES), ("backend", CHOICES)):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        check_arms([self.arm])
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            least = 1 if f.name in _POSITIVE else 0
            if f.type in (int, float) and not least <= value < math.inf:
                raise ValueError(f"{f.name} must be a finite number >= {least}, got {value}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        head_dim = self.n_embd // self.n_head
        if ARMS[self.arm].has_rank and head_dim < self.R:
            raise ValueError(f"R must be between 0 and the head dim {head_dim}, got {self.R}")
        if self.dropout >= 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


_POSITIVE = {
    *("n_layer", "n_head", "n_embd", "block", "vocab_size", "steps", "batch"),
    *("eval_every", "val_pieces", "log_every"),
}
RUN_OPTIONS = ("arm", "R", "seed", "dtype")  # a study names several of each


@dataclass(frozen=True)
class Group:
    """Runs of all combinations; an arm without reciprocal lanes runs once, not for each R."""

    arms: tuple[str, ...] = tuple(ARMS)
    R: tuple[int, ...] = (4,)
    dtype: tuple[str, ...] = ("fp32",)


@dataclass(frozen=True)
class Study:
    """Groups of runs with everything else in common."""

    groups: tuple[Group, ...] = (Group(),)
    seeds: tuple[int, ...] = (0, 1, 2)
    base: Settings = Settings()

    def runs(self) -> list[Settings]:
        """Every run once, seed by seed, so that a study cut short compares arms all the same."""
        runs: dict[str, Settings] = {}
        for seed in self.seeds:
            for group in self.groups:
                for dtype in group.dtype:
                    for arm in group.arms:
                        for R in group.R if ARMS[arm].has_rank else (0,):
                            run = replace(self.base, arm=arm, R=R, seed=seed, dtype=dtype)
                            runs.setdefault(run.name, run)
        return list(runs.values())


def check_arms(names: Iterable[str]) -> None:
    """ValueError for a name that is no arm."""
    for name in names:
        if name not in ARMS:
            raise ValueError(f"no such arm: {name!r}; arms are {', '.join(ARMS)}")


PRESETS = {
    "cpu": Study(
        (
            Group(),
            Group(RECIPROCAL, R=(8,)),
            Group(("baseline", "ra-composed"), dtype=("bf16",)),
        ),
        base=Settings(threads=1),
    ),
    "h200": Study(
        (
            Group(dtype=("bf16",)),
            Group(RECIPROCAL, R=(8,), dtype=("bf16",)),
            Group(("baseline", "ra-composed"), dtype=("fp16",)),
        ),
        base=Settings(
            n_layer=12,
            n_head=12,
            n_embd=768,
            block=1024,
            steps=1500,
            batch=32,
            lr=6e-4,
            warmup=100,
            eval_every=150,
            val_pieces=128,
            checkpoint_every=500,
            corpus_bytes=1_000_000_000,
        ),
    ),
    "124m-1h": Study(
        (Group(dtype=("bf16",)),),
        base=Settings(
            n_layer=12,
            n_head=12,
            n_embd=768,
            block=1024,
            vocab_size=50304,
            steps=2500,
            batch=480,
            micro_batch=32,
            lr=6e-4,
            warmup=250,
            eval_every=125,
            val_pieces=512,
            checkpoint_every=250,
            corpus_bytes=1_000_000_000,
            compile=True,
        ),
    ),
}


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's keys and values.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TOML, or Python 3.10, which cannot read it.
    """
    try:
        import tomllib
    except ImportError:
        raise ValueError("TOML files need Python 3.11; use the command line's options") from None
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def make_study(preset: str | None, *layers: Mapping[str, Any]) -> Study:
    """The preset, changed by each layer of keys in turn: a TOML file's, the command line's.

    Args:
        preset: a name of :data:`PRESETS`; None: the first layer that has a key ``preset``, or cpu.
        *layers: ``arms``, ``seeds``, ``R`` and ``dtype`` are lists; the rest is ``Settings``'.
            One of ``arms``, ``R`` and ``dtype`` replaces the preset's groups by one.

    Raises:
        ValueError: unknown keys, values of another type, and what ``Settings.check`` raises.
    """
    merged = {key: value for layer in layers for key, value in layer.items()}
    preset = preset or merged.get("preset", "cpu")
    merged.pop("preset", None)
    if preset not in PRESETS:
        raise ValueError(f"no such preset: {preset!r}; presets are {', '.join(PRESETS)}")
    study = PRESETS[preset]
    lists = {key: _list(key, merged.pop(key)) for key in _LISTS if key in merged}
    check_arms(lists.get("arms", ()))
    seeds = lists.pop("seeds", study.seeds)
    groups = (replace(study.groups[0], **lists),) if lists else study.groups
    base = replace(study.base, **{key: _value(key, value) for key, value in merged.items()})
    study = Study(groups, seeds, base)
    for run in study.runs():
        run.check()
    return study


_LISTS = {"arms": str, "seeds": int, "R": int, "dtype": str}
_FIELDS = {f.name: f for f in dataclasses.fields(Settings) if f.name not in RUN_OPTIONS}


def _list(key: str, value: Any) -> tuple[Any, ...]:
    kind = _LISTS[key]
    if not isinstance(value, (list, tuple)) or not value or any(type(v) is not kind for v in value):
        raise ValueError(f"{key} must be a list of {kind.__name__}, got {value!r}")
    return tuple(value)


def _value(key: str, value: Any) -> Any:
    if key not in _FIELDS:
        raise ValueError(f"no such setting: {key!r}; settings are {', '.join((*_LISTS, *_FIELDS))}")
    kind = _FIELDS[key].type
    if key in ("data", "val_data"):
        if not isinstance(value, (list, tuple)) or any(type(v) is not str for v in value):
            raise ValueError(f"{key} must be a list of file names, got {value!r}")
        return tuple(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{key} must be {kind.__name__}, got {value!r}")  # type: ignore[union-attr]
    return value
