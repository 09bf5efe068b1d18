"""A run in progress: what it consists of, how it starts, what a checkpoint holds."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from bench.models.data import Corpus, load_corpus
from bench.models.gpt import GPT, GPTConfig
from bench.study.arms import build_model
from bench.study.settings import Settings
from bench.study.world import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FREE = {"log_every", "checkpoint_every", "keep_model", "sample", "prompt"}  # may change on resume


@dataclass
class Training:
    """A run in progress.

    Attributes:
        settings: of the run.
        world: processes.
        device: of this process.
        corpus: texts.
        gpt: the model itself.
        model: what is called: the same, perhaps compiled and across processes.
        optimizer: AdamW.
        scaler: scales the loss under fp16; elsewhere it does nothing.
        step: the next one.
        skips: steps in a row that fp16 left out.
        times: seconds of each step of this process.
    """

    settings: Settings
    world: World
    device: torch.device
    corpus: Corpus
    gpt: GPT
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    step: int = 0
    skips: int = 0
    times: list[float] = field(default_factory=list)

    def autocast(self) -> torch.autocast:
        """Lower precision where the settings ask for it."""
        lower = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=lower)

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products."""
        return DTYPES[self.settings.dtype]


def load_data(settings: Settings) -> Corpus:
    """The texts of a run; raises what :func:`bench.models.data.load_corpus` raises."""
    return load_corpus(
        [Path(name) for name in settings.data],
        [Path(name) for name in settings.val_data],
        length=settings.block + 1,
        vocab_size=settings.vocab_size,
        max_bytes=settings.corpus_bytes,
    )


def model_config(settings: Settings) -> GPTConfig:
    """The model's sizes."""
    s = settings
    sizes = (s.block, s.vocab_size, s.n_layer, s.n_head, s.n_embd)
    return GPTConfig(*sizes, dropout=s.dropout, bias=s.bias)


def start_training(settings: Settings, corpus: Corpus, world: World) -> Training:
    """The model with its initial values, and all that trains it."""
    device = world.device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    gpt = build_model(
        settings.arm,
        settings.R,
        model_config(settings),
        seed=settings.seed,
        backend=settings.backend,
    ).to(device)
    torch.manual_seed(settings.seed + world.rank)  # dropout differs between processes
    model: nn.Module = gpt
    if settings.compile:
        torch.compiler.reset()  # or a study of many models runs into the limit of recompilations
        model = torch.compile(gpt)  # type: ignore[assignment]
    if world.size > 1:
        ids = [device.index] if device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    on_gpu = device.type == "cuda"
    optimizer = gpt.adamw(settings.lr, weight_decay=settings.weight_decay, fused=on_gpu)
    scaler = GradScaler(device.type, enabled=settings.dtype == "fp16")
    return Training(settings, world, device, corpus, gpt, model, optimizer, scaler)


def fixed_settings(settings: Settings) -> dict[str, Any]:
    """Settings that a resumed run must share with the checkpoint."""
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}
    return {key: value for key, value in listed.items() if key not in FREE}


def training_state(run: Training) -> dict[str, Any]:
    """What a checkpoint holds: enough to go on bit by bit."""
    cuda = torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None
    return {
        "settings": fixed_settings(run.settings),
        "step": run.step,
        "skips": run.skips,
        "model": run.gpt.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": cuda,
    }


def restore(run: Training, state: dict[str, Any]) -> None:
    """Go back to a state of :func:`training_state`."""
    run.step, run.skips = state["step"], state["skips"]
    run.gpt.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None and run.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"], run.device)
