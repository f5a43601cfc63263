"""How to open exported models: text and code for their model cards."""

from __future__ import annotations

from typing import Any

_DIT = """\
## Use

Exactly as trained, with diffusers alone:

```python
import torch
from diffusers import {network}, {scheduler}{vae_class}

folder = "path/to/this/folder"  # also what the hub's snapshot_download returns
transformer = {network}.from_pretrained(folder, subfolder="transformer").eval()
for block in transformer.transformer_blocks:  # see below
    block.norm1.emb.time_proj.downscale_freq_shift = 0
    block.norm3.eps = 1e-6
scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")
scheduler.set_timesteps({steps})

labels = torch.tensor([0, 1])  # names are in model_index.json under id2label
x = torch.randn(len(labels), {channels}, {size}, {size}, generator=torch.Generator().manual_seed(0))
x = x * scheduler.init_noise_sigma
classes = torch.cat([labels, torch.full_like(labels, {null_class})])  # {null_class} is "no class"
for t in scheduler.timesteps:
    both = scheduler.scale_model_input(torch.cat([x, x]), t)
    with torch.no_grad():
        noise = transformer(both, timestep=t.expand(len(both)), class_labels=classes).sample[:, :{channels}]
    conditional, unconditional = noise.chunk(2)
    guided = unconditional + {scale} * (conditional - unconditional)
    noise = torch.cat([guided[:, :{guided}], conditional[:, {guided}:]], dim=1)
    x = scheduler.step(noise, t, x).prev_sample
{decoding}
```

- diffusers' class computes another timestep embedding than the one that this model was trained with
  (`downscale_freq_shift` of 1 instead of 0). On random weights that changes the output by 2 % at t = 100 and by 11 %
  at t = 999; the loop over the blocks above corrects it, as `make_exact` of
  `lightning_difftune.models.diffusers_layout` does.
- {pipeline}{drawn}
- `difftune sample path/to/this/folder --classes ...` draws pictures, and `lightning_difftune.models.load_dit` reads the
  folder back without loss.
"""

_FLOW = """\
## Use

This model predicts the velocity of a straight path (flow matching), which diffusers' `DiTPipeline` does not integrate:

```bash
difftune sample path/to/this/folder --classes 0 1
```

`lightning_difftune.models.load_dit` reads the folder back without loss, and
`lightning_difftune.models.diffusers_layout.load_exact_transformer` opens the transformer as diffusers' class.
"""

_FILE = """\
## Use

The tensors have the official names of DiT; the file's metadata states architecture, class names and sampler settings.

```bash
difftune sample {file} --classes 0 1{vae}
```

`lightning_difftune.models.load_dit("{file}")` opens it.
"""

_UNET = """\
## Use

```python
from diffusers import DiffusionPipeline, {kind}

{part} = {kind}.from_pretrained("path/to/this/folder")
pipeline = DiffusionPipeline.from_pretrained("{base}", {part}={part})
```
"""

_CONTROLNET = """\
## Use

```python
from diffusers import AutoPipelineForText2Image, ControlNetModel

controlnet = ControlNetModel.from_pretrained("path/to/this/folder")
pipeline = AutoPipelineForText2Image.from_pretrained("{base}", controlnet=controlnet)
```
"""

_ADAPTER = """\
## Use

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/folder")  # base: {what}
```
"""


_LORA = """\
## Use

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base}")
pipeline.load_lora_weights("path/to/this/folder")
```
"""


def usage_of_dit(architecture: dict[str, Any], sampling: dict[str, Any] | None, has_autoencoder: bool) -> str:
    """How to use a DiT's diffusers folder, as Markdown."""
    sampling = sampling or {"scheduler": "DDIMScheduler", "scheduler_config": {"prediction_type": "epsilon"}}
    kind = sampling["scheduler"]
    if sampling["scheduler_config"].get("prediction_type", "flow_prediction") == "flow_prediction":
        return _FLOW
    classes, channels = architecture["num_classes"], architecture["in_channels"]
    guided = sampling.get("guidance_channels", 3)
    if has_autoencoder:
        decoding = 'vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")\n'
        decoding += (
            "pictures = vae.decode(x / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample.clamp(-1, 1)"
        )
    elif channels in (1, 3):
        decoding = "pictures = x.clamp(-1, 1)  # this model draws pixels and has no autoencoder"
    else:
        decoding = "# the autoencoder that x is a latent of is not part of this folder"
    return _DIT.format(
        network="DiTTransformer2DModel",
        scheduler=kind,
        vae_class=", AutoencoderKL" if has_autoencoder else "",
        steps=sampling.get("num_inference_steps", 50),
        scale=sampling.get("guidance_scale", 1.5),
        guided=channels if guided is None else min(guided, channels),
        channels=channels,
        size=architecture["input_size"],
        null_class=classes,
        decoding=decoding,
        pipeline=_pipeline(classes, has_autoencoder, channels),
        drawn=_drawn(sampling),
    )


def _drawn(sampling: dict[str, Any]) -> str:
    """What the loop of the card leaves out: parts of the sampler that need the pre-trained model."""
    parts = {
        "domain_guidance": "is guided away from the pre-trained model (Domain Guidance)",
        "pretrained_tail": "leaves the last steps to the pre-trained model",
    }
    found = [text for name, text in parts.items() if sampling.get(name)]
    if not found:
        return ""
    return (
        f"\n- The sampler of this model {' and '.join(found)}, which the loop above does not do: "
        "`difftune sample path/to/this/folder --base BASE` does, with the model that it was tuned from."
    )


def _pipeline(classes: int, has_autoencoder: bool, channels: int) -> str:
    if not has_autoencoder and channels in (1, 3):
        return (
            "`DiTPipeline.from_pretrained(folder, vae=None)` opens the folder, but cannot draw with it: its loop ends "
            "in an autoencoder, and a model of raw pixels has none."
        )
    passed = "" if has_autoencoder else " Pass the autoencoder that the latents come from as `vae=`."
    if classes == 1000:
        return f"`DiTPipeline` draws with it, guidance included, on all latent channels.{passed}"
    return (
        f"`DiTPipeline` draws with it at `guidance_scale=1`.{passed} Its class 1000 for guidance is not this model's "
        f"null class, {classes}, so guidance needs the loop above."
    )


def usage_of_file(file: str, needs_autoencoder: bool) -> str:
    """How to use a DiT in one safetensors file, as Markdown."""
    return _FILE.format(file=file, vae=" --vae stabilityai/sd-vae-ft-ema" if needs_autoencoder else "")


def usage_of_network(network: Any, base: str) -> str:
    """How to use a folder with a UNet or a ControlNet, as Markdown."""
    template = _CONTROLNET if type(network).__name__ == "ControlNetModel" else _UNET
    kind = type(network).__name__
    return template.format(base=base, kind=kind, part="unet" if kind.startswith("UNet") else "transformer")


def usage_of_adapter(network: Any, base: str, format: str = "peft") -> str:
    """How to use a folder with a LoRA adapter in peft or diffusers, as Markdown."""
    if format == "diffusers":
        return _LORA.format(base=base)
    if hasattr(network, "save_pretrained"):
        kind = type(network).__name__
        what = f'diffusers\' {kind} of "{base}"'
    else:
        what = (
            f'load_dit("{base}") of lightning_difftune.models, its projections split by lightning_difftune.tuners.LoRA'
        )
    return _ADAPTER.format(what=what)
