"""Order of the two streams: depends only on the seed and the step, not on processes and resumes."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_difftune.data.batches import (
    BalancedStream,
    ShuffledStream,
    TrainingBatches,
    TrainingSteps,
)
from lightning_difftune.data.real_pictures import LabelledTargets
from lightning_difftune.errors import DataError


def read(indices, flips):
    return {"pixel_values": torch.tensor(indices, dtype=torch.float32), "class_labels": torch.tensor(indices) % 3}


def batches(num_samples=23, batch_size=4, retained=2, rank=0, world_size=1):
    return TrainingBatches(
        read,
        ShuffledStream(num_samples, batch_size, 0, rank, world_size),
        lambda indices: {"latents": indices.float()},
        ShuffledStream(7, retained, 1, rank, world_size),
    )


def test_a_pass_reads_every_sample_once_and_drops_none():
    stream = ShuffledStream(23, 4, seed=0)
    order = [index for step in range(46) for index in stream.indices(step)]  # 184 = 8 passes over 23
    passes = [order[i : i + 23] for i in range(0, 184, 23)]
    assert all(sorted(one) == list(range(23)) for one in passes)
    assert len({tuple(one) for one in passes}) == 8


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_what_one_process_would_read(world_size):
    whole = ShuffledStream(23, 6, seed=3)
    shares = [ShuffledStream(23, 6 // world_size, 3, rank, world_size) for rank in range(world_size)]
    for step in range(20):
        for rank, share in enumerate(shares):
            assert share.indices(step) == whole.indices(step)[rank::world_size]
            assert share.coins(step) == whole.coins(step)[rank::world_size]


def test_every_batch_has_the_exact_shares():
    data = batches()
    assert len(data) == 5
    for step in range(12):
        assert len(data[step]["target"]["class_labels"]) == 4
        assert len(data[step]["retention"]["latents"]) == 2


def test_a_target_smaller_than_a_batch_wraps_around():
    data = TrainingBatches(read, ShuffledStream(3, 8, 0))
    assert len(data) == 1
    assert set(data[0]["target"]["pixel_values"].tolist()) == {0, 1, 2}
    assert "retention" not in data[0]


def test_coins_are_fair_and_change_from_step_to_step():
    stream = ShuffledStream(100, 64, seed=0)
    tosses = [tuple(stream.coins(step)) for step in range(100)]
    assert len(set(tosses)) == 100
    assert 0.45 < sum(map(sum, tosses)) / 6400 < 0.55


def test_steps_count_on_from_epoch_to_epoch():
    steps = TrainingSteps(batches())
    for epoch in range(3):
        steps.set_epoch(epoch)
        assert list(steps) == list(range(5 * epoch, 5 * epoch + 5))


@pytest.mark.parametrize(
    ("progress", "expected"),
    [((0, 0), [0, 1, 2, 3, 4]), ((8, 3), [8, 9]), ((5, 5), [5, 6, 7, 8, 9]), ((10, 0), [10, 11, 12, 13, 14])],
)
def test_steps_start_where_the_run_stands(progress, expected):
    assert list(TrainingSteps(batches(), lambda: progress)) == expected


def test_workers_keep_the_order():
    data = TrainingBatches(read, ShuffledStream(23, 4, 0))
    orders = []
    for num_workers in (0, 2):
        loader = DataLoader(data, batch_size=None, sampler=TrainingSteps(data), num_workers=num_workers)
        orders.append([batch["target"]["pixel_values"].tolist() for batch in loader])
    assert orders[0] == orders[1]


def test_streams_pickle_without_their_cache():
    stream = ShuffledStream(1000, 4, 0)
    stream.indices(0)
    copy = pickle.loads(pickle.dumps(stream))
    assert copy.indices(3) == stream.indices(3)


def test_a_label_outside_the_table_names_its_picture():
    labelled = LabelledTargets(read, 2, "picture-{}.jpg".format)
    assert len(labelled([0, 1], [False, False])["class_labels"]) == 2
    with pytest.raises(DataError, match=r"picture-5.jpg.*outside the label table"):
        labelled([1, 5], [False, False])


LONG_TAIL = np.array([4] * 50 + [0] * 9 + [7])  # classes of 50, 9 and 1 samples


def test_classes_of_a_long_tail_come_equally_often():
    stream = BalancedStream(LONG_TAIL, 5, seed=0)
    order = [index for step in range(180) for index in stream.indices(step)]  # 900 = 300 turns of 3 classes
    assert {label: int((LONG_TAIL[order] == label).sum()) for label in (0, 4, 7)} == {0: 300, 4: 300, 7: 300}
    assert all(sorted(LONG_TAIL[order[i : i + 3]]) == [0, 4, 7] for i in range(0, 900, 3))
    for label, count in ((4, 50), (0, 9)):  # no sample of a class repeats before all others of it
        own = [index for index in order if LONG_TAIL[index] == label]
        passes = [own[i : i + count] for i in range(0, len(own) - count + 1, count)]
        assert len(set(own[:count])) == count
        assert all(sorted(one) == sorted(own[:count]) for one in passes)
        assert len({tuple(one) for one in passes}) == len(passes)
    orders = {tuple(LONG_TAIL[order[i : i + 3]]) for i in range(0, 900, 3)}
    assert len(orders) == 6  # of the classes, all occur
    assert BalancedStream(LONG_TAIL, 5, seed=1).indices(0) != stream.indices(0)


def test_the_balanced_stream_is_a_function_of_seed_and_step_too():
    whole = BalancedStream(LONG_TAIL, 6, seed=3)
    shares = [BalancedStream(LONG_TAIL, 2, 3, rank, 3) for rank in range(3)]
    later = pickle.loads(pickle.dumps(shares[1]))
    for step in (*range(20), 3, 100):
        for rank, share in enumerate(shares):
            assert share.indices(step) == whole.indices(step)[rank::3]
        assert later.indices(step) == shares[1].indices(step)
