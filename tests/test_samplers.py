"""The images of a training step depend only on the seed and the step."""

from __future__ import annotations

import itertools

import pytest

from superglobal.data.samplers import EpochBatches
from superglobal.errors import InputError

LENGTH, BATCH, SEED = 53, 12, 4


def steps(epochs: int, begin: int = 0, **options: int) -> list[list[list[tuple[int, int]]]]:
    """Return the parts of every step from `begin` on, iterating over the epochs like Lightning."""
    batches = EpochBatches(LENGTH, BATCH, SEED, **options)
    batches.start_at(begin)
    parts = []
    for epoch in range(begin // batches.steps, epochs):
        batches.set_epoch(epoch)
        parts += list(batches)
    k = options.get("accumulate", 1)
    return [parts[i : i + k] for i in range(0, len(parts), k)]


def test_every_epoch_is_a_new_permutation_in_complete_steps():
    all_steps = steps(3)
    assert len(all_steps) == 3 * (LENGTH // BATCH)
    epochs = [[key for parts in all_steps[4 * e : 4 * e + 4] for part in parts for key in part] for e in range(3)]
    for number, epoch in enumerate(epochs):
        indices = [index for key_epoch, index in epoch if key_epoch == number]
        assert len(indices) == len(set(indices)) == 48
        assert set(indices) <= set(range(LENGTH))
    assert len({tuple(index for _, index in epoch) for epoch in epochs}) == 3
    assert steps(3) == all_steps


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (3, 2), (1, 4), (4, 3)])
def test_processes_and_accumulated_parts_divide_the_same_steps(world, accumulate):
    whole = steps(2)
    ranks = [steps(2, accumulate=accumulate, rank=rank, world=world) for rank in range(world)]
    for k, (step,) in enumerate(whole):
        parts = [ranks[rank][k][part] for part in range(accumulate) for rank in range(world)]
        assert list(itertools.chain(*parts)) == step


@pytest.mark.parametrize("begin", range(12))
def test_batches_can_resume_at_any_step(begin):
    assert steps(3, begin, accumulate=2) == steps(3, accumulate=2)[begin:]


def test_a_batch_size_that_cannot_be_split_is_an_error():
    with pytest.raises(InputError, match=r"divisible by the number of processes .5."):
        EpochBatches(LENGTH, BATCH, SEED, world=5)
    with pytest.raises(InputError, match="at most the 53 training images"):
        EpochBatches(LENGTH, 54, SEED)
