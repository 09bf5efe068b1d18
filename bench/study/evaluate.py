"""What the log says about a run besides its steps: first line, validation, last line."""

import math
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from bench.harness.report import environment
from bench.models.data import count_places, pieces_at
from bench.models.gpt import next_token_loss
from bench.study.arms import count_parameters, parameter_count
from bench.study.probe import observe
from bench.study.speed import matmul_peak, peak_memory_mb
from bench.study.training import Training

WARM_STEPS = 5  # not timed: the first ones compile and allocate


def header(run: Training) -> dict[str, Any]:
    """Settings, sizes, corpus and machine."""
    count, plain = parameter_count(run.gpt), count_parameters("baseline", 0, run.gpt.config)
    return {
        "name": run.settings.name,
        "settings": asdict(run.settings),
        "parameters": count,
        "versus_baseline": count / plain - 1,
        "corpus": run.corpus.name,
        "fingerprint": run.corpus.fingerprint(),
        "train_tokens": sum(map(len, run.corpus.train)),
        "val_tokens": sum(map(len, run.corpus.val)),
        "processes": run.world.size,
        "matmul_peak": matmul_peak(run.device, run.dtype, torch.get_num_threads()),
        "environment": environment(run.device),
    }


@torch.no_grad()
def evaluate(run: Training) -> dict[str, Any]:
    """Loss over the same pieces in every run, evenly spread over the validation text."""
    settings, texts = run.settings, run.corpus.val
    length = settings.block + 1
    places = torch.linspace(0, count_places(texts, length) - 1, settings.val_pieces).long()
    run.gpt.eval()
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    for some in places.split(settings.micro_batch or settings.batch):
        tokens = pieces_at(texts, some, length).to(run.device)
        with run.autocast():
            loss = next_token_loss(run.gpt(tokens[:, :-1]), tokens)
        total += loss.double() * len(some)
    val_loss = (total / len(places)).item()
    with run.autocast():
        seen = observe(run.gpt, pieces_at(texts, places[:1], settings.block).to(run.device))
    run.gpt.train()
    per_byte = run.corpus.bytes_per_token
    bits = None if per_byte is None else val_loss / math.log(2) / per_byte
    return {"step": run.step, "val_loss": val_loss, "bits_per_byte": bits, **seen}


def draw_sample(run: Training) -> str:
    """The prompt and what the model draws after it: text for bytes, else token ids."""
    settings = run.settings
    is_text = run.corpus.bytes_per_token is not None
    prompt = list(settings.prompt.encode()) if is_text else [0]
    generator = torch.Generator(run.device).manual_seed(settings.seed)
    with run.autocast():
        drawn = run.gpt.eval().generate(
            torch.tensor([prompt], device=run.device), settings.sample, generator
        )
    ids = drawn[0].tolist()
    return _printable(bytes(ids).decode(errors="replace")) if is_text else str(ids)


def _printable(text: str) -> str:
    """Without what would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def footer(run: Training) -> dict[str, Any]:
    """Time, memory and a sample of text."""
    timed = run.times[WARM_STEPS:] or run.times
    return {
        "step_ms": median(timed) * 1e3,
        "train_seconds": sum(run.times),
        "memory_mb": peak_memory_mb(run.device),
        "sample": draw_sample(run),
    }
