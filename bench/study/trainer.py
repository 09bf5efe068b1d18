"""Train one run: nanoGPT's recipe, the same batches for every arm of a seed, an exact resume.

The batch of a step is a pure function of seed and step, so order does not depend on the arm, on the
number of processes, or on where a run was resumed. AdamW, linear warm-up, cosine decay, clipping.
"""

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.models.data import Corpus, count_places, pieces_at
from bench.models.gpt import GPT, next_token_loss
from bench.study.evaluate import evaluate, footer, header
from bench.study.probe import NonFiniteError, all_finite, gate_parameters, name_non_finite
from bench.study.runlog import CHECKPOINT, RunLog, load_checkpoint, save_checkpoint
from bench.study.settings import Settings
from bench.study.speed import flops_per_token, matmul_peak, reset_peak_memory
from bench.study.training import (
    Training,
    fixed_settings,
    restore,
    start_training,
    training_state,
)
from bench.study.world import World

MAX_SKIPS = 20  # steps in a row without an update: fp16's scale halves on each

StepHook = Callable[[int, GPT], None]


def train(
    settings: Settings,
    corpus: Corpus,
    folder: Path,
    *,
    world: World | None = None,
    stop_at: int | None = None,
    resume: bool = False,
    before_step: StepHook | None = None,
) -> GPT:
    """Train one model and write its log and checkpoint below ``folder``.

    Args:
        settings: the run.
        corpus: see :func:`load_data`.
        folder: of this run; made if need be.
        world: processes; None: this one.
        stop_at: write a checkpoint before this step and return.
        resume: go on from the checkpoint, if there is one.
        before_step: called with step and model before each step.

    Returns:
        The trained model.

    Raises:
        NonFiniteError: a NaN or an infinity in the loss, a gradient or a gate; the log has it too.
        ValueError: a checkpoint of other settings; sizes that do not fit.
    """
    world = world or World()
    reset_peak_memory(world.device(settings.device))
    run = start_training(settings, corpus, world)
    state = load_checkpoint(folder, fixed_settings(settings)) if resume else None
    log = RunLog(folder if world.leads else None)
    if state is None:
        log.start(**header(run))
    else:
        restore(run, state)
        log.go_on(run.step)
    last = settings.steps if stop_at is None else min(stop_at, settings.steps)
    try:
        _loop(run, log, folder, last, before_step)
    except NonFiniteError as error:
        log.write("stop", step=run.step, reason=str(error))
        raise
    ended = run.step == settings.steps
    if ended:
        log.write("eval", **evaluate(run))
        log.write("end", step=run.step, **footer(run))
    else:
        log.write("pause", step=run.step)
    if world.leads:
        if not ended or settings.keep_model:
            save_checkpoint(folder, training_state(run))
        else:
            (folder / CHECKPOINT).unlink(missing_ok=True)
    world.wait()
    return run.gpt


def _loop(
    run: Training, log: RunLog, folder: Path, last: int, before_step: StepHook | None
) -> None:
    from tqdm import tqdm

    settings = run.settings
    tokens = settings.batch * settings.block
    flops = flops_per_token(run.gpt, settings.block) * tokens
    peak = matmul_peak(run.device, run.dtype, torch.get_num_threads())
    show = None if run.world.leads else True
    with tqdm(
        total=settings.steps, initial=run.step, desc=settings.name, disable=show, leave=False
    ) as bar:
        while run.step < last:
            if run.step % settings.eval_every == 0:
                log.write("eval", **evaluate(run))
            if before_step is not None:
                before_step(run.step, run.gpt)
            start = time.perf_counter()
            facts = train_step(run)
            seconds = time.perf_counter() - start
            run.times.append(seconds)
            facts |= {
                "tokens_per_s": tokens / seconds,
                "mfu": flops / seconds / (peak * run.world.size),
            }
            if run.step % settings.log_every == 0:
                log.write("step", step=run.step, **facts)
            bar.set_postfix_str(
                f"loss {facts['loss']:.3f}, {facts['tokens_per_s']:,.0f} tokens/s, "
                f"MFU {facts['mfu']:.0%}",
                refresh=False,
            )
            bar.update()
            run.step += 1
            every = settings.checkpoint_every
            if run.world.leads and every and run.step % every == 0:
                save_checkpoint(folder, training_state(run))


def learning_rate(settings: Settings, step: int) -> float:
    """nanoGPT's: linear to ``lr`` over ``warmup`` steps, then half a cosine to ``min_lr * lr``."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / (settings.warmup + 1)
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    low = settings.lr * settings.min_lr
    return low + 0.5 * (1 + math.cos(math.pi * done)) * (settings.lr - low)


def batch_at(corpus: Corpus, settings: Settings, step: int) -> Tensor:
    """The global batch ``[batch, block + 1]`` of a step: seed and step alone decide."""
    text = hashlib.sha256(f"{settings.seed}:{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(text[:7], "big"))
    length = settings.block + 1
    places = torch.randint(
        count_places(corpus.train, length), (settings.batch,), generator=generator
    )
    return pieces_at(corpus.train, places, length)


def train_step(run: Training) -> dict[str, float]:
    """One update; returns its loss, learning rate, gradient norm and fp16's scale.

    Raises:
        NonFiniteError: with the step and the names of the tensors.
    """
    settings = run.settings
    rate = learning_rate(settings, run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    tokens = run.world.share(batch_at(run.corpus, settings, run.step)).to(run.device)
    parts = tokens.split(settings.micro_batch or len(tokens))
    total = torch.zeros((), device=run.device)
    for i, part in enumerate(parts):
        # Gradients travel between processes once, with the last part.
        several = isinstance(run.model, nn.parallel.DistributedDataParallel)
        quiet = several and i < len(parts) - 1
        with run.model.no_sync() if quiet else nullcontext():  # type: ignore[operator]
            with run.autocast():
                loss = next_token_loss(run.model(part[:, :-1]), part)
            loss = loss * (len(part) / len(tokens))
            run.scaler.scale(loss).backward()
        total += loss.detach()
    run.scaler.unscale_(run.optimizer)
    parameters = [p for p in run.gpt.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    mean_loss = run.world.mean(total).item()
    _check_finite(run, mean_loss, norm.item())  # clipping would spread a NaN to every gradient
    nn.utils.clip_grads_with_norm_(parameters, settings.clip or math.inf, norm)
    scale = run.scaler.get_scale()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    facts = {"loss": mean_loss, "lr": rate, "norm": norm.item()}
    return {**facts, "scale": scale} if run.scaler.is_enabled() else facts


def _check_finite(run: Training, loss: float, norm: float) -> None:
    sound = math.isfinite(loss) and all_finite(gate_parameters(run.gpt).values())
    if sound and math.isfinite(norm):
        run.skips = 0
        return
    run.skips += 1
    # fp16 looks for its scale by overflowing: such a step is left out, unless it never ends.
    if sound and run.scaler.is_enabled() and run.skips <= MAX_SKIPS:
        return
    what = name_non_finite(run.gpt, loss) or f"norm of all gradients ({norm})"
    raise NonFiniteError(f"step {run.step}: not finite: {what}")
