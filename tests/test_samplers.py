"""Which photos a step is made of depends on the seed and the step alone."""

from __future__ import annotations

import itertools

import pytest

from superglobal.data.samplers import EpochBatches
from superglobal.errors import InputError

LENGTH, BATCH, SEED = 53, 12, 4


def steps(epochs: int, begin: int = 0, **how: int) -> list[list[list[tuple[int, int]]]]:
    """Per step from `begin` on, its parts, as Lightning goes through the epochs."""
    batches = EpochBatches(LENGTH, BATCH, SEED, **how)
    batches.start_at(begin)
    parts = []
    for epoch in range(begin // batches.steps, epochs):
        batches.set_epoch(epoch)
        parts += list(batches)
    k = how.get("accumulate", 1)
    return [parts[i : i + k] for i in range(0, len(parts), k)]


def test_every_epoch_is_another_permutation_cut_into_whole_steps():
    found = steps(3)
    assert len(found) == 3 * (LENGTH // BATCH)
    epochs = [[place for parts in found[4 * e : 4 * e + 4] for part in parts for place in part] for e in range(3)]
    for number, epoch in enumerate(epochs):
        indices = [index for of, index in epoch if of == number]
        assert len(indices) == len(set(indices)) == 48
        assert set(indices) <= set(range(LENGTH))
    assert len({tuple(index for _, index in epoch) for epoch in epochs}) == 3
    assert steps(3) == found


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (3, 2), (1, 4), (4, 3)])
def test_processes_and_parts_share_the_same_steps(world, accumulate):
    whole = steps(2)
    ranks = [steps(2, accumulate=accumulate, rank=rank, world=world) for rank in range(world)]
    for k, (step,) in enumerate(whole):
        parts = [ranks[rank][k][part] for part in range(accumulate) for rank in range(world)]
        assert list(itertools.chain(*parts)) == step


@pytest.mark.parametrize("begin", range(12))
def test_batches_continue_at_any_step(begin):
    assert steps(3, begin, accumulate=2) == steps(3, accumulate=2)[begin:]


def test_a_batch_size_that_cannot_be_split_is_an_error():
    with pytest.raises(InputError, match=r"divisible by the number of processes .5."):
        EpochBatches(LENGTH, BATCH, SEED, world=5)
    with pytest.raises(InputError, match="at most the 53 training images"):
        EpochBatches(LENGTH, 54, SEED)
