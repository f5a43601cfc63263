"""``difftune swap``: the chain of forgetting of one tuned model, or of two (Fig. 1 of the paper)."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from lightning_difftune.callbacks.chain_of_forgetting import swap_meter
from lightning_difftune.cli.arguments import CONFIG_OPTIONS, CommandParser, check_writable, values_of
from lightning_difftune.cli.lightning import DiffTuneCLI, run_lightning
from lightning_difftune.cli.run import Run
from lightning_difftune.cli.run_files import check_checkpoint
from lightning_difftune.cli.tuned import TunedRun, measure
from lightning_difftune.errors import ConfigError, check_counts
from lightning_difftune.files import atomic_write
from lightning_difftune.modules import DiffTuningModule
from lightning_difftune.plots import save, swap_figure
from lightning_difftune.trust import split_trusted

DESCRIPTION = """Leave the last p % of the reverse process to the pre-trained model, or with --tail to another
tuned one, and measure the pictures against p.

  difftune swap RUN
  difftune swap RUN_A RUN_B --name tuned --name full

Config, extractor, number of pictures and batch size are the run's own: those of its ChainOfForgetting callback or,
without one, of its FID callback. All other options are --config and overrides of its keys, as of `difftune validate`;
with --config, that config stands for all runs."""


def swap(argv: Sequence[str]) -> None:
    """Measure each checkpoint, then write ``swap.csv``, ``swap.svg`` and ``swap.png``."""
    parser = CommandParser("swap", DESCRIPTION)
    parser.add_run("folder of a run, or a checkpoint; two to compare them", several=True)
    parser.add_argument("--name", action="append", default=[], help="what a run is called in the figure")
    parser.add_argument("--tail", help="run that does the last steps (default: the pre-trained model)")
    parser.add_argument("--output", type=Path, default=Path("runs/swap"), help="folder of the results")
    parser.add_argument("--percents", type=float, nargs="+", default=None, help="the p (default: 0 10 .. 100)")
    parser.add_argument("--num_samples", type=int, default=None, help="pictures for each p (default: the config's)")
    options, rest = parser.parse_known_args(argv)
    check_counts(parser.prog, num_samples=options.num_samples)
    if not all(0 <= percent <= 100 for percent in options.percents or ()):
        raise ConfigError(f"--percents are numbers from 0 to 100, got {' '.join(map(str, options.percents))}.")
    rest, trusted = split_trusted(rest)
    runs = [Run.find(place, saved=True) for place in options.run]
    paths = [str(run.checkpoint) for run in runs]
    names = options.name or names_of(paths)
    if len(names) != len(paths) or len(set(names)) != len(names):
        raise ConfigError(f"Give each of the {len(paths)} runs its own --name, got {names}.")
    check_writable(options.output)
    for path in paths:
        check_checkpoint(Path(path))  # before the first is measured

    series: dict[str, dict[float, float]] = {}
    strips: dict[str, Tensor] = {}
    tail: DiffTuningModule | None = None
    tail_weights: AbstractContextManager[None] = nullcontext()
    if options.tail is not None:
        tuned, done = TunedRun(options.tail, [f"--trust={name}" for name in trusted]), list[str]()
        tail, tail_weights = tuned.module, tuned.weights(False, done)
        print(f"The last steps are done by {options.tail}, {done[0]}.")
    clis, chains = list[DiffTuneCLI](), dict[str, Any]()
    for name, run in zip(names, runs, strict=True):
        own = [] if values_of(rest, *CONFIG_OPTIONS) else ["--config", yaml.safe_dump(run.settings(trusted))]
        quiet = ["--trainer.logger", "false", "--trainer.limit_val_batches", "1"]
        cli = run_lightning([*own, *rest, *quiet], run=False)
        clis.append(cli)
        chain = chains[name] = swap_meter(vars(cli.trainer)["callbacks"])
        chain.dirpath = options.output / name
        if options.percents is not None:
            chain.percents = sorted(set(options.percents))
        if options.num_samples is not None:
            chain.num_samples = options.num_samples
        if tail is not None:
            chain.generate = generator(cli.model, tail)
    refuse_other_measures(chains)
    with tail_weights:
        for (name, chain), cli, path in zip(chains.items(), clis, paths, strict=True):
            measure(cli, chain, Path(path))
            series[name], strips[name] = chain.history[-1][1], chain.strip
    if len({chain.reference_key for chain in chains.values()}) > 1:
        print("The runs hold out other pictures, so that the distances of one do not compare with those of the other.")
    if cli.trainer.is_global_zero:
        last = "the pre-trained model" if tail is None else names_of([*paths, str(options.tail)])[-1]
        write_results(options.output, series, strips, chain, last)


def refuse_other_measures(chains: Mapping[str, Any]) -> None:
    """Refuse distances of another extractor or number of pictures in one figure, where they do not compare."""
    measures = {name: f"{chain.monitor} of {chain.num_samples:,} pictures" for name, chain in chains.items()}
    if len(set(measures.values())) > 1:
        raise ConfigError(
            f"The runs would be measured in different ways, {', '.join(f'{n} by {m}' for n, m in measures.items())}. "
            "Give --num_samples N, and --config FILE for an extractor of all runs."
        )


def generator(model: DiffTuningModule, tail: DiffTuningModule) -> Callable[[Tensor, Sequence[float]], Tensor]:
    """A function that generates pictures of ``model`` with the last steps by ``tail``, on the device of ``model``."""

    def generate(indices: Tensor, fractions: Sequence[float]) -> Tensor:
        tail.trainer = model.trainer  # whose data have the examples that a ControlNet draws from
        return model.generate_swapped(indices, fractions, tail.to(model.device))

    return generate


def names_of(paths: Sequence[str]) -> list[str]:
    """The part of each path that differs, such as the folder of the run."""
    if len(paths) == 1:
        return ["tuned"]
    parts = [Path(path).parts for path in paths]
    differing = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) == len(paths)), -1)
    return [Path(path[differing]).stem for path in parts]


def write_results(
    output: Path, series: dict[str, dict[float, float]], strips: dict[str, Tensor], chain: Any, tail: str
) -> None:
    """Write the table and the figure, and print their paths and meaning."""
    with StringIO(newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("model", "swapped_percent", chain.monitor))
        for name, distances in series.items():
            writer.writerows((name, f"{percent:g}", f"{value:.6g}") for percent, value in distances.items())
        atomic_write(output / "swap.csv", file.getvalue().encode())
    save(swap_figure(series, strips, f"Fréchet distance ({chain.distance.name})", tail), output / "swap")
    for name, distances in series.items():
        best = min(distances, key=lambda percent: distances[percent])
        tuned = f", {distances[0]:.4g} with none" if 0 in distances else ""
        print(f"{name}: {chain.monitor} is least, {distances[best]:.4g}, with {best:g} % swapped{tuned}.")
    print(f"Look at {output / 'swap.png'}; the numbers are in {output / 'swap.csv'}.")
