"""Advice on what to try next, by a few rules; each shows the numbers that it is based on."""

from __future__ import annotations

import math
import statistics
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from lightning_difftune.cli.facts import best_of, name_of
from lightning_difftune.cli.run import Run
from lightning_difftune.data.real_pictures import FEW_PICTURES

GAIN = 0.02  # relative gain of a score in about the last quarter of a run that is worth more training
LOSS = 0.05  # relative loss of a score since its best that is more than noise
LEAP = 3.0  # factor of the loss over its previous median, if that is also unusual for the run
SIGMAS = 5.0  # deviations of the logarithm of the loss that are unusual
RISE = 0.10  # relative rise of the retention loss from the first third of a run to the last


@dataclass(frozen=True)
class Advice:
    """One piece of advice."""

    what: str  # the advice
    evidence: str  # the measurements
    command: str = ""  # the command line for it, if there is one


def advise(run: Run) -> list[Advice]:
    """The advice of every rule that applies to the run."""
    return [advice for rule in RULES if (advice := rule(run)) is not None]


def diverged(run: Run) -> Advice | None:
    """The loss is not finite."""
    bad = [step for step, value in run.metrics.get("train/loss", []) if not math.isfinite(value)]
    if not bad:
        return None
    halves = run.setting("trainer", "precision") == "16-mixed"
    return Advice(
        "Lower the learning rate" + (", or train in bf16-mixed or 32-true instead of 16-mixed." if halves else "."),
        f"train/loss is not finite at {len(bad)} of {len(run.metrics['train/loss'])} steps, first at step {bad[0]:,}.",
    )


def leapt(run: Run) -> Advice | None:
    """The loss was far above all previous values at two successive logged steps, whether or not it recovered."""
    series = run.finite("train/loss")
    logs = [math.log(value) for _, value in series if value > 0]
    if len(logs) < 8 or len(logs) < len(series):
        return None
    # In a normal distribution the median distance of two values is 0.954 standard deviations; leaps hardly change it.
    deviation = statistics.median(abs(after - before) for before, after in pairwise(logs)) / 0.954
    threshold = max(math.log(LEAP), SIGMAS * deviation)
    past: list[float] = []  # kept sorted, since sorting at each step would take minutes for a long run
    for position in range(1, len(logs) - 1):
        insort(past, logs[position - 1])
        before = (past[(position - 1) // 2] + past[position // 2]) / 2  # the median
        if position > 1 and min(logs[position : position + 2]) - before > threshold:
            until = series[position - 1][0]
            step, top = max(series[position : position + 2], key=lambda point: point[1])
            clips = run.setting("trainer", "gradient_clip_val")
            return Advice(
                f"Lower the learning rate{'' if clips else ', or clip gradients'}: the run diverged, and what the "
                "pre-trained model knew may be lost even if the loss has come back.",
                f"train/loss leapt to {top:.3g} at step {step:,}; its median until step {until:,} was "
                f"{math.exp(before):.3g}. It ends at {series[-1][1]:.3g}.",
                "" if clips else "--trainer.gradient_clip_val 1.0",
            )
    return None


def unfinished(run: Run) -> Advice | None:
    """The logs end before the last step."""
    if not run.stopped_early:
        return None
    evidence = f"The logs end at step {run.last_step:,} of {run.max_steps:,}"
    if run.checkpoint is None:
        every = (run.callback("ModelCheckpoint") or {}).get("every_n_train_steps")
        how = f"more often than every {every:,} steps" if every else "with every_n_train_steps of ModelCheckpoint"
        what = f"Save checkpoints {how}, so that a run that stops can be resumed."
        return Advice(what, f"{evidence}, and the folder has no checkpoint.")
    evidence = f"{evidence}; {run.checkpoint.name} is there."
    return Advice("Resume the run where it stopped.", evidence, f"difftune fit {name_of(run)}")


def train_longer(run: Run) -> Advice | None:
    """A score was still improving."""
    for name, higher in run.scores.items():
        series = run.finite(name)
        if run.stopped_early or len(series) < 3 or series[-1][1] != best_of(series, higher)[1]:
            continue
        last_quarter = series[-1][0] - (series[-1][0] - series[0][0]) / 4  # with few values, more than a quarter
        before = [point for point in series if point[0] <= last_quarter][-1]
        gain = abs(series[-1][1] - before[1]) / max(abs(before[1]), 1e-12)
        if gain > GAIN:
            return Advice(
                "Train longer: it was still getting better.",
                f"{name} was {before[1]:.4g} at step {before[0]:,} and is best at the end, {series[-1][1]:.4g} at step "
                f"{series[-1][0]:,}: {gain:.0%} better.",
                _steps(run, 2 * run.max_steps) if run.max_steps else "",
            )
    return None


def stop_earlier(run: Run) -> Advice | None:
    """A score was better before the end."""
    for name, higher in run.scores.items():
        series = run.finite(name)
        if len(series) < 3:
            continue
        (step, best), (last_step, last) = best_of(series, higher), series[-1]
        if abs(last - best) > LOSS * abs(best):
            mode = "max" if higher else "min"
            kept = (run.callback("ModelCheckpoint") or {}).get("monitor") == name
            keep = f"; ModelCheckpoint(monitor='{name}', mode='{mode}') keeps the best weights"
            return Advice(
                f"Stop earlier, or lower the learning rate{'' if kept else keep}.",
                f"{name} was best at step {step:,}, {best:.4g}, and is {last:.4g} at step {last_step:,}.",
            )
    return None


def few_validations(run: Run) -> Advice | None:
    """One or two values of a score are not a curve."""
    counts = {name: len(run.finite(name)) for name in (*run.scores, "val/loss")}
    most = max(counts.values())
    if run.stopped_early or not 0 < most < 3 or run.max_steps is None:
        return None
    name = next(name for name, count in counts.items() if count == most)
    every = max(1, run.max_steps // 8) * (run.setting("trainer", "accumulate_grad_batches") or 1)  # in batches
    return Advice(
        f"Validate more often: {'two values are' if most == 2 else 'one value is'} too few to judge the run by.",
        f"{name} was measured {'twice' if most == 2 else 'once'} in {run.max_steps:,} steps.",
        f"--trainer.val_check_interval {every}" if run.max_steps > 8 else "",
    )


def retain_more(run: Run) -> Advice | None:
    """The loss on the memory bank rises: the pre-trained model's knowledge is being lost."""
    values = [value for _, value in run.finite("train/retention")]
    third = len(values) // 3
    if third < 4:
        return None
    first, last = values[:third], values[-third:]
    rise = statistics.fmean(last) - statistics.fmean(first)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / third)
    if not rise > max(RISE * statistics.fmean(first), 2 * error):
        return None
    share = run.setting("data", "init_args", "retention_share")
    larger = min(0.5, 1.5 * share) if isinstance(share, int | float) and 0 < share < 0.5 else None
    return Advice(
        "Retain more: a larger share of the memory bank in each batch, or a larger retention_weight.",
        f"train/retention rose from {statistics.fmean(first):.3g}, the mean of the first third of the run, to "
        f"{statistics.fmean(last):.3g} in the last (the standard error of the difference is {error:.1g}).",
        f"--data.retention_share {larger:g}" if larger else "",
    )


def overfits(run: Run) -> Advice | None:
    """The loss on held-out pictures rises while that on training pictures falls."""
    held_out, train = run.finite("val/loss"), run.finite("train/reconsolidation")
    if len(held_out) < 4 or len(train) < 8 or not run.validates_all:
        return None
    (step, best), (last_step, last) = best_of(held_out, False), held_out[-1]
    quarter = len(train) // 4
    early, late = (statistics.fmean(value for _, value in part) for part in (train[:quarter], train[-quarter:]))
    if not (last > (1 + LOSS) * best and late < early):
        return None
    tuner = "" if run.setting("model", "init_args", "tuner") else ", train less of the network (a tuner, such as LoRA)"
    return Advice(
        f"Train fewer steps{tuner}, or add pictures: it is memorising.",
        f"val/loss rose from {best:.4g} at step {step:,} to {last:.4g} at step {last_step:,}, while "
        f"train/reconsolidation fell from {early:.3g} to {late:.3g}.",
    )


def small_classes(run: Run) -> Advice | None:
    """Classes with a handful of pictures."""
    counts = run.environment.get("class_counts")
    if not isinstance(counts, dict):
        return None
    few = {name: count for name, count in counts.items() if 0 < count < FEW_PICTURES}
    if not few:
        return None
    least = ", ".join(f"{name} {count}" for name, count in sorted(few.items(), key=lambda item: item[1])[:5])
    return Advice(
        "Add pictures to the small classes, or merge them: so few are learned by heart. Domain Guidance may help, "
        "without training (difftune sample --domain_guidance), and the preset self_teacher.",
        f"{len(few)} of {len(counts)} classes {'has' if len(few) == 1 else 'have'} fewer than {FEW_PICTURES} "
        f"pictures; the smallest: {least}.",
    )


def few_pictures(run: Run) -> Advice | None:
    """FID from fewer pictures than Inception has features, which is not comparable with published values."""
    for name, facts in run.score_facts.items():
        pictures, features = facts.get("num_samples"), facts.get("num_features")
        if name == "fid" and pictures and features and pictures < features:
            return Advice(
                f"Measure {facts['label']} with 10,000 pictures before comparing it with anything else.",
                f"{name} was taken of {pictures:,} pictures. With fewer than the extractor's {features:,} features the "
                "covariance is singular and the value too large, by an amount that depends on their number.",
            )
    return None


def measured_schedule(run: Run) -> Advice | None:
    """The forgetting meter left a schedule."""
    file = run.path / "forgetting" / "schedule.json"
    if not file.is_file() or "MeasuredSchedule" in run.config_text:
        return None
    return Advice(
        "Try the schedule that the forgetting meter measured, in place of the fixed one.",
        f"{file.name} says at which noise levels tuning improved the denoising of this target, and where it did not.",
        f"--model.objective.schedule lightning_difftune.MeasuredSchedule --model.objective.schedule.path {file}",
    )


def unmeasured(run: Run) -> Advice | None:
    """No callback evaluated generated pictures."""
    if run.scores or run.grids:
        return None
    watched = [name for name in ("SampleGrid", "FID", "ControlSimilarity") if run.callback(name) is not None]
    if watched:
        every = run.setting("trainer", "val_check_interval")
        return Advice(
            f"Validate earlier: {' and '.join(watched)} look at pictures then, and did not get to it.",
            f"The logs have {run.last_step:,} steps, and a validation was to be after {every or 'an epoch'}.",
        )
    return Advice(
        "Look at pictures while it trains: callbacks SampleGrid and FID, or ControlSimilarity for a ControlNet.",
        "No distance or similarity was logged and no pictures were saved; losses alone do not say how pictures look.",
        "--trainer.callbacks+=lightning_difftune.callbacks.SampleGrid",
    )


RULES: tuple[Callable[[Run], Advice | None], ...] = (
    diverged,
    leapt,
    unfinished,
    few_validations,
    train_longer,
    stop_earlier,
    retain_more,
    overfits,
    small_classes,
    few_pictures,
    measured_schedule,
    unmeasured,
)


def _steps(run: Run, steps: int) -> str:
    """Options for another number of steps, also of a learning-rate schedule that was set for the old number."""
    schedule = ("model", "init_args", "lr_scheduler", "init_args", "total_steps")
    also = f" --model.lr_scheduler.total_steps {steps}" if run.max_steps == run.setting(*schedule) else ""
    return f"--trainer.max_steps {steps}{also}"
