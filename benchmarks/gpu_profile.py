"""Profile of a training step on a GPU, for gpu.py."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from gpu_measure import BF16, Figures, device
from harness import device_name, now, quiet_trainer

FAMILIES = {
    "matrix products": r"gemm|cutlass|nvjet|s16816|sm90_xmma|splitK|cublas",
    "attention": r"flash|fmha|attention|sdpa",
    "optimizer and averages": r"multi_tensor_apply|fused_adam|lerp|foreach",
    "compiled element-wise": r"^triton",
    "normalisation": r"layer_norm|LayerNorm|group_norm|RowwiseMoments",
    "copies and casts": r"copy|Memcpy|Memset|direct_copy|CatArray",
    "reductions": r"reduce",
    "element-wise": r"elementwise|vectorized|unrolled",
}


def profile(step: Callable[[], None], steps: int = 3) -> Figures:
    """The time of a step: kernels by family, the gaps between them, and the host's waits."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with torch_profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        now()
    kernels: dict[str, float] = defaultdict(float)
    waits, operations = 0, 0
    spans: list[tuple[float, float]] = []
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if event.time_range.elapsed_us() <= 0 or "ProfilerStep" in event.name:
                continue
            spans.append((event.time_range.start, event.time_range.end))
            family = next((name for name, words in FAMILIES.items() if re.search(words, event.name)), "other")
            kernels[family] += event.time_range.elapsed_us() / 1e3 / steps
        elif re.fullmatch(r"cuda(Stream|Event)Synchronize", event.name):
            waits += 1
        elif event.name.startswith("aten::"):
            operations += 1
    busy, end = 0.0, 0.0
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = (end - min(s for s, _ in spans)) if spans else 0.0
    return {
        "device": device_name(),
        "aten_calls_per_step": operations // steps,
        "kernels_per_step": len(spans) // steps,
        "host_waits_per_step": round(waits / steps, 1),
        "busy_ms": round(busy / 1e3 / steps, 2),
        "gaps_ms": round((whole - busy) / 1e3 / steps, 2),
        "kernel_ms": {name: round(ms, 2) for name, ms in sorted(kernels.items(), key=lambda item: -item[1])},
    }


def profiled_fit(module: Any, batch: Any) -> Figures:
    """A profile of our step, without the Trainer's own loop around it."""
    where = torch.device(device())
    optimizer = module.to(where).configure_optimizers()
    trainer = quiet_trainer(10**6, precision=BF16)
    module.trainer = trainer
    trainer.strategy.connect(module)
    on_device = {name: {key: x.to(where) for key, x in part.items()} for name, part in batch.items()}

    def step() -> None:
        with torch.autocast(where.type, torch.bfloat16), module.weights_cast(module.denoise):
            prepared = module.prepare(on_device, draws := module.draws(0))
            loss = module.objective(module.denoise, *prepared, draws, on_device["retention"], module.teacher).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    figures = profile(step)
    module._trainer = None
    return figures
