"""Random numbers: separate streams, and float32 with any default type."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_dit

from lightning_difftune import DiffTuningObjective
from lightning_difftune.draws import Draws, choices_of, noise_of, seed_of, uniform_of


def test_no_two_keys_share_a_seed():
    keys = [("a",), ("a", 0), ("a", 7), ("a", 7, 0), ("a", 0, 7), ("a", 70), ("b", 7), ("b", 7, 0), ("a7",)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert all(0 <= seed_of(*key) < 2**63 for key in keys)


def test_a_number_is_the_same_key_in_every_type():
    keys = np.int64(7), torch.tensor(7)
    assert {seed_of("noise", key) for key in keys} == {seed_of("noise", 7)}
    for key in ("7", 7.0):
        with pytest.raises(TypeError):
            seed_of("noise", key)


def test_what_is_drawn_for_one_index_is_independent_of_what_else_is_drawn_for_it():
    indices = torch.arange(2000)
    noise = noise_of(0, indices, (1,)).flatten()
    others = [
        noise_of(0, indices, (1,), "noise of predictions").flatten(),
        uniform_of(0, indices),
        choices_of(0, indices, 1000).float(),
    ]
    table = torch.corrcoef(torch.stack([noise, *others]))
    assert (table - torch.eye(4)).abs().max() < 0.1


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_type_changes_no_number(default):
    def drawn():
        draws, indices = Draws(3, 4), torch.arange(4)
        return [draws.uniform(9000), draws.normal(5, 2), noise_of(0, indices, (3,)), uniform_of(0, indices)]

    expected = drawn()
    torch.set_default_dtype(default)
    try:
        found = drawn()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found, expected, strict=True))
    assert len((found[0] * 1000).long().unique()) > 995


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_objective_can_be_compiled(backend):
    objective, model = DiffTuningObjective(), tiny_dit()
    arguments = torch.zeros(5, 1, 8, 8), torch.arange(5), torch.arange(5) >= 4
    expected = objective(model, *arguments, Draws(0, 1)).loss
    compiled = torch.compile(objective, backend=backend)
    for step in range(3):
        found = compiled(model, *arguments, Draws(0, 1)).loss
        compiled(model, *arguments, Draws(0, step))
        torch.testing.assert_close(found, expected)
