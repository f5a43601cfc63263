"""The parameter-efficient methods on a tiny DiT, and their counts on the published one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_difftune.errors import ConfigError
from lightning_difftune.models import DiT, export_dit, load_dit
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.protocols import Tuner
from lightning_difftune.tuners import AdaptFormer, BitFit, DiffFit, LoRA, VPTDeep
from lightning_difftune.tuners.base import ParameterEfficientTuner

TUNERS = [BitFit(), DiffFit(), LoRA(rank=2), AdaptFormer(bottleneck=4), VPTDeep(blocks=(1,), num_tokens=2)]
MERGING = [*TUNERS[:3], DiffFit(("attn.qkv", "attn.proj", "attn", "mlp"), num_blocks=1), LoRA(3, 6, ("k", "attn.proj"))]


def tiny_dit() -> DiT:
    torch.manual_seed(0)
    model = DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=6)
    return randomised(model, 0.2)


def randomised(model: DiT, std: float) -> DiT:
    """Values away from zero in all that is trained, because the published start hides mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    return model


@torch.no_grad()
def output_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return model(torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([0, 500, 999]), torch.tensor([0, 5, 6]))


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def title(tuner: object) -> str:
    return type(tuner).__name__


@pytest.mark.parametrize(
    ("tuner", "count"),
    [
        (None, 673_799_072),
        (BitFit(), 607_136),
        (DiffFit(), 832_928),
        (DiffFit(("attn.qkv", "attn.proj", "mlp.fc1", "adaLN_modulation.1"), num_blocks=14), 832_928),
        (AdaptFormer(), 4_280_320),
        (LoRA(), 1_149_696),
        (VPTDeep(), 2_816_672),
    ],
)
def test_counts_of_table_1(tuner: Tuner | None, count: int) -> None:
    with torch.device("meta"):
        model = DiT.from_size("DiT-XL/2")
        model.resize_label_table(101)
        if tuner is not None:
            tuner.apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_count_of_the_difffit_authors_placement() -> None:
    with torch.device("meta"):
        model = DiT.from_size("DiT-XL/2")
        DiffFit(("attn.qkv", "attn.proj", "attn", "mlp"), num_blocks=14).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_739_552


@pytest.mark.parametrize("tuner", TUNERS[:4], ids=title)
def test_starts_as_the_pretrained_function(tuner: Tuner) -> None:
    model = tiny_dit()
    before = output_of(model)
    tuner.apply(model)
    torch.testing.assert_close(output_of(model), before, rtol=0, atol=0 if title(tuner) != "LoRA" else 1e-6)


@pytest.mark.parametrize("tuner", TUNERS, ids=title)
def test_all_that_is_trained_has_a_gradient_and_counts(tuner: Tuner) -> None:
    model = tiny_dit()
    tuner.apply(model)
    randomised(model, 0.2)  # at the start, one half of LoRA and of the adapters has none
    model(torch.randn(7, 1, 8, 8), torch.arange(7), torch.arange(7)).square().sum().backward()
    assert not model.pos_embed.requires_grad
    table = model.y_embedder.embedding_table.weight.grad
    assert table is not None
    assert (table != 0).all()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        # The key's bias shifts all logits of a query alike, which softmax does not see.
        elif "qkv.bias" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_each_method_trains_what_it_is_known_for() -> None:
    names = {}
    for tuner in TUNERS:
        model = tiny_dit()
        plain = set(dict(model.named_parameters()))
        tuner.apply(model)
        names[title(tuner)] = trained_names(model)
        assert "y_embedder.embedding_table.weight" in names[title(tuner)]
        if title(tuner) != "LoRA":
            assert plain <= set(dict(model.named_parameters())), "the pre-trained parameters keep their names"
    table = {"y_embedder.embedding_table.weight"}
    assert all(name.endswith(".bias") for name in names["BitFit"] - table)
    gammas = names["DiffFit"] - names["BitFit"]
    assert {name.removeprefix("blocks.1.") for name in gammas if name.startswith("blocks.1.")} == {
        f"{site}.gamma.weight" for site in ("attn.qkv", "attn.proj", "attn", "mlp.fc2", "mlp")
    }
    assert {name.removeprefix("blocks.0.") for name in names["LoRA"] if name.startswith("blocks.0.")} == {
        f"attn.qkv.{part}.lora_{half}.default.weight" for part in "qv" for half in "AB"
    }
    assert all(".mlp.adapter." in name for name in names["AdaptFormer"] - table)
    assert {name for name in names["VPTDeep"] - table if "final_layer" not in name} == {"blocks.1.prompt"}


@pytest.mark.parametrize("tuner", MERGING, ids=title)
def test_merge_computes_the_same_as_a_plain_dit(tuner: ParameterEfficientTuner, tmp_path: Path) -> None:
    model = tiny_dit()
    before = output_of(model)
    tuner.apply(model)
    randomised(model, 0.1)
    tuned, state = output_of(model), fingerprint(model)
    assert not torch.allclose(tuned, before, atol=1e-2)

    merged = tuner.merge(model)

    torch.testing.assert_close(output_of(merged), tuned, rtol=1e-5, atol=1e-5)
    assert list(merged.state_dict()) == list(tiny_dit().state_dict()), "the official key names"
    assert not trained_names(merged)
    assert fingerprint(model) == state
    assert torch.equal(output_of(model), tuned), "the tuned model can be trained on"
    torch.testing.assert_close(output_of(load_dit(export_dit(merged, tmp_path / "m.safetensors"))), output_of(merged))
    tuner.apply(merged)


@pytest.mark.parametrize(("tuner", "reason"), [(TUNERS[3], "ReLU"), (TUNERS[4], "attention")])
def test_what_cannot_be_merged_says_why(tuner: ParameterEfficientTuner, reason: str) -> None:
    model = tiny_dit()
    tuner.apply(model)
    with pytest.raises(ConfigError, match=f"cannot be merged.*{reason}"):
        tuner.merge(model)


@pytest.mark.parametrize("tuner", TUNERS, ids=title)
def test_a_copy_of_a_tuned_model_is_independent(tuner: Tuner) -> None:
    model = tiny_dit()
    tuner.apply(model)
    randomised(model, 0.2)
    before = output_of(model)
    clone = copy.deepcopy(model)
    assert torch.equal(output_of(clone), before)
    randomised(clone, 0.2)
    assert torch.equal(output_of(model), before)
    assert not torch.allclose(output_of(clone), before, atol=1e-3)


def test_adapter_is_beside_the_mlp() -> None:
    model = tiny_dit()
    AdaptFormer(bottleneck=4, scale=0.5).apply(model)
    mlp = randomised(model, 0.3).blocks[0].mlp
    x = torch.randn(2, 3, 16)
    down, up = mlp.adapter.down, mlp.adapter.up
    plain = mlp.fc2(mlp.act(mlp.fc1(x)))
    hidden = (x @ down.weight.T + down.bias).clamp(min=0)
    torch.testing.assert_close(mlp(x), plain + 0.5 * (hidden @ up.weight.T + up.bias))


def test_vpt_mixes_the_prompt_into_attention_alone() -> None:
    model = tiny_dit()
    block = copy.deepcopy(model.blocks[1])
    VPTDeep(blocks=(1,), num_tokens=2).apply(model)
    x, c = torch.randn(3, 4, 16), torch.randn(3, 16)
    tokens = torch.cat([model.blocks[1].prompt.expand(3, 2, 16), x], dim=1)
    torch.testing.assert_close(model.blocks[1](x, c), block(tokens, c)[:, 2:])
    assert not torch.allclose(model.blocks[1](x, c), block(x, c), atol=1e-3), "why its docstring promises no identity"
    for tuned in (model.blocks[1], block):  # without attention's gate, the prompt reaches nobody
        nn.init.zeros_(tuned.adaLN_modulation[1].weight[32:48])
        nn.init.zeros_(tuned.adaLN_modulation[1].bias[32:48])
    torch.testing.assert_close(model.blocks[1](x, c), block(x, c))


ALIEN = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))


@pytest.mark.parametrize(
    ("tuner", "message"),
    [
        (BitFit(), "'bias'"),
        (DiffFit(), "'blocks'"),
        (LoRA(), r"\['q', 'v'\]"),
        (AdaptFormer(), "'blocks'"),
        (VPTDeep(), "'blocks'"),
    ],
)
def test_a_model_without_the_targets_is_refused(tuner: Tuner, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tuner.apply(ALIEN)
    assert trained_names(ALIEN) == {"0.weight"}


@pytest.mark.parametrize(
    ("tuner", "message"),
    [
        (DiffFit(("attn.out",)), "'attn.out'"),
        (DiffFit(("norm1",)), "LayerNorm has none"),
        (DiffFit(num_blocks=3), "has 2"),
        (LoRA(rank=17), r"rank 17 is larger than the layer blocks.0.attn.qkv.q, which is 16 wide"),
        (LoRA(target_modules=("q", "to_v")), r"\['to_v'\]"),
        (AdaptFormer(), r"\[1, 16\].*64"),
        (VPTDeep(), r"\[2, 3, 4\].*0 to 1"),
    ],
)
def test_settings_that_do_not_fit_leave_the_model_alone(tuner: Tuner, message: str) -> None:
    model = tiny_dit()
    names, state = trained_names(model), fingerprint(model)
    with pytest.raises(ConfigError, match=message):
        tuner.apply(model)
    assert trained_names(model) == names
    assert fingerprint(model) == state
    BitFit().apply(model)


@pytest.mark.parametrize("tuner", TUNERS, ids=title)
def test_applying_twice_is_refused(tuner: ParameterEfficientTuner) -> None:
    model = tiny_dit()
    tuner.apply(model)
    names = trained_names(model)
    for second in (tuner, BitFit()):
        with pytest.raises(ConfigError, match=f"that {title(tuner)} was applied to"):
            second.apply(model)
    assert trained_names(model) == names
    with pytest.raises(ConfigError, match="this model has no tuner"):
        BitFit().merge(tiny_dit())


@pytest.mark.parametrize(
    "construct",
    [
        lambda: DiffFit(("mlp", "mlp")),
        lambda: VPTDeep(blocks=(1, 1)),
        lambda: VPTDeep(num_tokens=0),
    ],
)
def test_senseless_settings_are_refused(construct: type[Tuner]) -> None:
    with pytest.raises(ConfigError, match="needs"):
        construct()


def test_a_seventh_method_is_one_class() -> None:
    class ModulationTuner(ParameterEfficientTuner):
        def insert(self, model: nn.Module) -> list[nn.Parameter]:
            return [p for name, p in model.named_parameters() if "adaLN_modulation" in name]

    model = tiny_dit()
    ModulationTuner().apply(model)
    assert isinstance(ModulationTuner(), Tuner)
    assert len(trained_names(model)) == 2 * 3 + 1
    with pytest.raises(ConfigError, match="ModulationTuner cannot be merged"):
        ModulationTuner().merge(model)
