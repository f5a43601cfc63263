"""All measurements on a GPU, in at most four minutes on one GPU.

    python benchmarks/gpu.py --output runs/gpu                  # all parts, as far as four minutes go
    python benchmarks/gpu.py --output runs/gpu --parts xl small # some of them
    python benchmarks/gpu.py --output runs/gpu --tiny           # the same on tiny shapes, also on a CPU

Each part runs in its own process with its own time limit, so that an error or a part that hangs does not affect the
others. Every figure is written to a file of its part immediately (`PART.jsonl`), and all of them to `gpu.json` and
`gpu.md`; each has its peak memory. Weights are random and nothing is downloaded. `--budget` is the limit of all parts
together: parts that do not fit are left out, and the command that measures them is printed.

Parts that have never been measured come first; the others have figures in docs/performance.md, from before weights
were cast together.

| part | what is measured | so far |
|---|---|---|
| casts | DiT-XL/2 with weights cast together and by autocast, eager and compiled; EMA every 8 steps | never |
| graphs | the pixel DiT of 22.7 M parameters compiled as a whole, with CUDA graphs | never |
| authors | DiT-XL/2 in the authors' way: TF32, unfused AdamW, averages in a Python loop | never |
| text, controlnet | text-to-image and ControlNet on Stable Diffusion 1.5's shapes | never |
| data | training steps fed by the data module: pixels in memory and cached latents | never |
| whole | the pixel DiT and DiT-XL/2 compiled as a whole, which takes minutes; DiT-XL/2 with CUDA graphs | never |
| xl | training steps of DiT-XL/2-256 in bf16-mixed: eager and RegionalCompile, each as a bare loop, too | H100 |
| sampling | DiT-XL/2's memory bank and FID samples, without and with guidance, in bf16 and in TF32 | H100 |
| profile | where the time of a step of DiT-XL/2 is: kernels by family, gaps, host waits | H100 |
| small | the pixel DiT at batch 512, its sampling, and DiT-B/4 | H100 |
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU must not start CUDA here

import torch
from gpu_measure import Figures
from gpu_parts import PARTS, SIZES
from harness import parser_of
from rich.console import Console
from rich.table import Table

SHORT = dict.fromkeys(("authors", "text", "controlnet", "data"), 40)
LIMITS = {**dict.fromkeys(PARTS, 60), **SHORT, "graphs": 70, "whole": 110, "xl": 80}  # seconds
NO_CUDA_HERE = 77  # exit status of a forked process in which CUDA does not start


def measure(part: str, size: str, file: Path) -> None:
    """Take the figures of one part and write each immediately; an error is also a figure."""
    if torch.cuda.is_available():
        try:
            torch.zeros(1, device="cuda")
        except RuntimeError:
            traceback.print_exc()
            sys.exit(NO_CUDA_HERE)
    torch.set_float32_matmul_precision("high")  # as in the command line
    torch._dynamo.config.automatic_dynamic_shapes = False  # two batch sizes are two programs here
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")

    def keep(name: str, figures: Figures) -> None:
        with file.open("a") as lines:
            lines.write(json.dumps({"part": part, "name": name, **figures}) + "\n")

    try:
        for name, run in PARTS[part](SIZES[size]):
            began = time.perf_counter()
            try:
                figures = run()
            except Exception as error:
                traceback.print_exc()
                figures = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
            keep(name, {**figures, "took_s": round(time.perf_counter() - began, 2)})
    except Exception as error:
        traceback.print_exc()
        keep("set-up", {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"})


def run_part(part: str, size: str, folder: Path, seconds: float, how: str) -> tuple[list[dict[str, Any]], str]:
    """The figures of one part, and how processes start here: CUDA cannot be used in every forked one."""
    file = folder / f"{part}.jsonl"
    file.unlink(missing_ok=True)
    context: Any = multiprocessing.get_context(how)
    process = context.Process(target=measure, args=(part, size, file))
    began = time.perf_counter()
    process.start()
    process.join(max(1.0, seconds))
    if process.is_alive():
        process.kill()
        process.join()
        ending = f"stopped after {time.perf_counter() - began:.0f} s, its limit"
    elif process.exitcode == NO_CUDA_HERE and how == "fork":
        return run_part(part, size, folder, seconds, "spawn")
    else:
        ending = f"ended with status {process.exitcode}" if process.exitcode else ""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return rows + ([{"part": part, "name": "the rest of this part", "error": ending}] if ending else []), how


def main() -> None:
    """Run the parts, print the table, write it."""
    parser = parser_of(__doc__, "gpu")
    parser.set_defaults(output=Path("runs/gpu"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="in this order")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU, too")
    parser.add_argument("--budget", type=float, default=235, help="seconds of all parts together")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    size = "tiny" if options.tiny else "full"
    began, how = time.perf_counter(), "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    rows: list[dict[str, Any]] = []
    later: list[str] = []
    for part in options.parts:
        left = options.budget - (time.perf_counter() - began)
        if left < 5:
            later.append(part)
            rows.append({"part": part, "name": "all", "error": "left out: no time was left"})
            continue
        found, how = run_part(part, size, options.output, min(LIMITS[part], left), how)
        rows += found
        print(f"{part}: {len(found)} figures, {time.perf_counter() - began:.0f} s so far", flush=True)
        write(options.output, rows, time.perf_counter() - began)
    Console(soft_wrap=True, width=200).print(table_of(rows))
    if later:
        rest = f"--output {options.output}-rest --parts {' '.join(later)}" + " --tiny" * options.tiny
        print(f"No time was left for these parts: python benchmarks/gpu.py {rest}")


def write(folder: Path, rows: list[dict[str, Any]], seconds: float) -> None:
    """Everything so far, as JSON and as a table in Markdown."""
    command = "python benchmarks/gpu.py " + " ".join(sys.argv[1:])
    content = {"command": command, "torch": torch.__version__, "seconds": round(seconds, 1), "rows": rows}
    (folder / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [f"`{command}`, torch {torch.__version__}, {rows[0].get('device', '')}", "", "| part | figure | |"]
    lines += ["|---|---|---|", *(f"| {row['part']} | {row['name']} | {summary(row)} |" for row in rows)]
    (folder / "gpu.md").write_text("\n".join(lines) + "\n")


def table_of(rows: list[dict[str, Any]]) -> Table:
    """All figures for a screen."""
    table = Table(title=next((str(row["device"]) for row in rows if "device" in row), ""), title_justify="left")
    for heading in ("part", "figure", ""):
        table.add_column(heading)
    for row in rows:
        table.add_row(row["part"], row["name"], summary(row))
    return table


def summary(row: dict[str, Any]) -> str:
    """The figures of a row in one line; profiles are long and stand in the JSON file."""
    shown = {k: v for k, v in row.items() if k not in ("part", "name", "device", "kernels", "command")}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())


if __name__ == "__main__":
    main()
