"""Weights cast together: the same results as autocast to the bit, with fewer operations."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from tiny import tiny_dit
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_difftune.models.casts import WeightCasts

X, T, Y = torch.linspace(-1, 1, 256).view(4, 1, 8, 8), torch.tensor([0, 300, 600, 999]), torch.tensor([0, 1, 2, 6])


def gradients(network, casts, steps=3):
    """Outputs and gradients of some steps of SGD."""
    seen = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16), casts.active() if casts else nullcontext():
            output = network(X, T, Y)
        output.float().square().mean().backward()
        seen += [output.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]
        for p in network.parameters():
            if p.grad is not None:
                p.data -= 0.1 * p.grad
                p.grad = None
    return seen


def same(first, second):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, second, strict=True))


def test_outputs_and_gradients_are_autocasts_to_the_bit():
    plain, cast = tiny_dit(depth=2), tiny_dit(depth=2)
    found = gradients(cast, WeightCasts([cast]))
    assert same(found, gradients(plain, None))
    assert len(found) > 30
    assert all(isinstance(p, nn.Parameter) and p.dtype == torch.float32 for p in cast.parameters())


def test_unfreezing_replacing_and_sharing_weights_in_between():
    plain = tiny_dit(depth=2)
    plain.blocks[1].mlp.fc1.weight = plain.blocks[0].mlp.fc1.weight
    plain.blocks[0].attn.requires_grad_(False)
    cast = copy.deepcopy(plain)
    casts = WeightCasts([cast])
    for change in (
        lambda network: network.blocks[0].attn.requires_grad_(True),
        lambda network: network.blocks[0].attn.requires_grad_(False),
        lambda network: network.blocks[0].attn.qkv.weight.detach().mul_(2),
        lambda network: setattr(network.blocks[1], "mlp", tiny_dit(7).blocks[0].mlp),
        lambda network: network.load_state_dict(tiny_dit(3, depth=2).state_dict(), assign=True),
    ):
        assert same(gradients(cast, casts), gradients(plain, None))
        change(plain)
        change(cast)
    assert same(gradients(cast, casts), gradients(plain, None))


def test_two_graphs_at_once_do_not_share_memory():
    network = tiny_dit(depth=1)
    casts, outputs = WeightCasts([network]), []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), casts.active():
            outputs.append(network(X, T, Y))
    sum(output.float().square().mean() for output in outputs).backward()
    found = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    expected = gradients(tiny_dit(depth=1), None, 1)[1:]
    torch.testing.assert_close(found, [2 * gradient for gradient in expected], rtol=1e-2, atol=1e-3)


def test_nothing_happens_without_autocast_or_with_recomputed_activations():
    network = tiny_dit()
    with WeightCasts([network]).active():
        assert network.blocks[0].attn.qkv.weight.dtype == torch.float32
    network.blocks[0].gradient_checkpointing = True
    with torch.autocast("cpu", torch.bfloat16), WeightCasts([network]).active():
        assert network.blocks[0].attn.qkv.weight.dtype == torch.float32


def test_weights_come_back_after_an_error():
    network = tiny_dit()
    with pytest.raises(ZeroDivisionError), torch.autocast("cpu", torch.bfloat16), WeightCasts([network]).active():
        1 / 0  # noqa: B018
    assert isinstance(network.blocks[0].attn.qkv.weight, nn.Parameter)


def test_a_block_that_is_checkpointed_by_hand_computes_the_same():
    plain, cast = tiny_dit(depth=1), tiny_dit(depth=1)
    for network in (plain, cast):
        forward = network.blocks[0].forward
        network.blocks[0].forward = partial(checkpoint, forward, use_reentrant=False)
    assert same(gradients(cast, WeightCasts([cast])), gradients(plain, None))
