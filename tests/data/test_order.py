import ast
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stableqat.data
from stableqat.data.mixture import Mixture, permutation
from stableqat.data.order import PAD, EvaluationOrder, TrainingLoader, sample_rng
from stableqat.data.order import TrainingOrder as MixedOrder
from stableqat.errors import UserError


class Echo:
    """A dataset whose batches are their own keys."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, keys):
        return torch.tensor(keys)


class Unreadable(Echo):
    def __getitem__(self, keys):
        raise UserError("cat.png is no image: remove it")


def TrainingOrder(size, *args, **kwargs):
    """Of one source."""
    return MixedOrder(Mixture([size]), *args, **kwargs)


def steps(order, count):
    """The keys of `count` steps, an epoch's iterator after the other, as a trainer takes them."""
    taken = []
    while len(taken) < count:
        for batch in order:
            taken.append(batch)
            order.advance()
            if len(taken) == count:
                break
    return taken


def together(per_rank):
    """One step's keys of all ranks, sample p from rank p % world."""
    return [
        [key for row in zip(*batches, strict=True) for key in row] for batches in zip(*per_rank, strict=True)
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_repeats_come_in_a_row_each_as_of_an_epoch_of_its_own(world):
    """As many epochs as repeats visit every sample as often, always with another augmentation."""
    orders = [
        TrainingOrder(12, 6 // world, seed=3, rank=r, world_size=world, repeats=3) for r in range(world)
    ]
    keys = [key for batch in together([steps(order, 6) for order in orders]) for key in batch]
    for first in range(0, 36, 3):
        assert len({index for _, _, index in keys[first : first + 3]}) == 1
        assert [epoch for _, epoch, _ in keys[first : first + 3]] == [0, 1, 2]
    assert len(set(keys)) == 36
    assert {index for _, _, index in keys[:12]} != {index for _, _, index in keys[12:24]}
    plain = [key for batch in steps(TrainingOrder(12, 6, seed=3), 2) for key in batch]
    assert [index for _, _, index in keys[::3]] == [index for _, _, index in plain]
    again = steps(TrainingOrder(12, 12, seed=3, repeats=3), 6)[3:]
    assert {epoch for batch in again for _, epoch, _ in batch} == {3, 4, 5}


def test_a_resumed_order_repeats_as_often():
    rows = Echo(12)
    saved = TrainingLoader(rows, TrainingOrder(12, 6, seed=3, repeats=3)).state_dict()
    with pytest.raises(UserError, match=r"checkpoint's number of repeats of an image is 3, this run's is 2"):
        TrainingLoader(rows, TrainingOrder(12, 6, seed=3, repeats=2)).load_state_dict(saved)
    plain = TrainingLoader(rows, TrainingOrder(12, 6, seed=3))
    old = plain.state_dict()
    del old["repeats"]
    plain.load_state_dict(old)  # of a time without repeats
    with pytest.raises(UserError, match=r"number of repeats of an image is 3, this run's is 1"):
        plain.load_state_dict(saved)


sizes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 40))


@given(sizes, st.integers(0, 2**63 - 1), st.integers(1, 25))
def test_ranks_together_equal_one_process(shape, seed, count):
    world, batch, more = shape
    size = world * batch + more
    ranks = [
        steps(TrainingOrder(size, batch, seed=seed, rank=rank, world_size=world), count)
        for rank in range(world)
    ]
    assert together(ranks) == steps(TrainingOrder(size, world * batch, seed=seed), count)


@given(sizes, st.integers(0, 1000))
def test_an_epoch_repeats_nothing_and_drops_less_than_a_step(shape, seed):
    world, batch, more = shape
    size = world * batch + more
    order = TrainingOrder(size, world * batch, seed=seed)
    for epoch in range(3):
        keys = [key for batch in steps(order, len(order)) for key in batch]
        assert {key[:2] for key in keys} == {(seed, epoch)}
        indices = {key[2] for key in keys}
        assert len(indices) == len(keys) > size - world * batch
        assert indices <= set(range(size))


@given(sizes, sizes, st.integers(0, 12), st.integers(0, 12))
def test_resume_on_another_number_of_processes_goes_on_where_it_stopped(shape, other, before, after):
    (world, batch, more), (new_world, _, _) = shape, other
    # The same global batch, over another number of processes that divides it.
    global_batch = world * batch
    new_world = next(w for w in range(new_world, 0, -1) if global_batch % w == 0)
    size = global_batch + more
    whole = steps(TrainingOrder(size, global_batch, seed=3), before + after)
    order = TrainingOrder(size, batch, seed=3, rank=0, world_size=world)
    steps(order, before) if before else None
    state = TrainingLoader(Echo(size), order).state_dict()
    resumed = []
    for rank in range(new_world):
        part = TrainingOrder(size, global_batch // new_world, seed=3, rank=rank, world_size=new_world)
        TrainingLoader(Echo(size), part).load_state_dict(state)
        resumed.append(steps(part, after) if after else [])
    assert together(resumed) == whole[before:]


def test_another_global_batch_resumes_at_the_same_sample():
    order = TrainingOrder(20, 4, seed=0)
    steps(order, 3)
    wider = TrainingOrder(20, 6, seed=0)
    wider.position = order.position
    expected = permutation(20, 0, 0)[12:18]
    assert [index for *_, index in steps(wider, 1)[0]] == expected.tolist()
    assert steps(wider, 1)[0][0][1] == 1  # two samples are left: the next step begins epoch 1


def test_permutation_is_fixed_for_good():
    assert permutation(10, 0, 0).tolist() != permutation(10, 0, 1).tolist() != permutation(10, 1, 0).tolist()
    assert permutation(10, 17, 2).tolist() == [8, 6, 0, 4, 3, 1, 9, 2, 5, 7]


@given(st.integers(0, 60), st.integers(1, 5), st.integers(1, 4))
def test_evaluation_visits_every_sample_once_in_equally_many_batches(size, batch, world):
    ranks = [list(EvaluationOrder(size, batch, rank=rank, world_size=world)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {len(EvaluationOrder(size, batch, world_size=world))}
    indices = [index for batches in ranks for keys in batches for *_, index in keys]
    assert sorted(index for index in indices if index != PAD) == list(range(size))
    assert all(1 <= len(keys) <= batch for batches in ranks for keys in batches)
    if world == 1:
        assert PAD not in indices


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_workers_that_run_ahead_do_not_move_the_place(workers, persistent):
    def loader():
        return TrainingLoader(
            Echo(22), TrainingOrder(22, 4, seed=5), num_workers=workers, persistent_workers=persistent
        )

    whole = [batch.tolist() for batch in steps_of(loader(), 13)]
    first = loader()
    head = [batch.tolist() for batch in steps_of(first, 7)]
    second = loader()
    second.load_state_dict(first.state_dict())
    tail = [batch.tolist() for batch in steps_of(second, 6)]
    assert head + tail == whole
    # An iterator that was dropped half-way leaves the stream where the last batch handed out ended.
    assert [batch.tolist() for batch in steps_of(first, 6)] == whole[7:]


def steps_of(loader, count):
    taken = []
    while len(taken) < count:
        for batch in loader:
            taken.append(batch)
            if len(taken) == count:
                break
    return taken


def test_a_batch_whose_step_was_cut_short_is_not_counted():
    unfinished = False
    loader = TrainingLoader(Echo(8), TrainingOrder(8, 2, seed=0), unfinished=lambda: unfinished)
    steps_of(loader, 2)
    assert loader.state_dict()["consumed"] == 4
    unfinished = True
    assert loader.state_dict()["consumed"] == 2


@pytest.mark.parametrize(
    ("size", "seed", "says"), [(9, 0, "number of training samples per epoch is 8"), (8, 1, "seed is 0")]
)
def test_other_data_does_not_resume(size, seed, says):
    state = TrainingLoader(Echo(8), TrainingOrder(8, 2, seed=0)).state_dict()
    with pytest.raises(UserError, match=says):
        TrainingLoader(Echo(size), TrainingOrder(size, 2, seed=seed)).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_error_stays_one_line(workers):
    loader = TrainingLoader(Unreadable(8), TrainingOrder(8, 2, seed=0), num_workers=workers)
    with pytest.raises(UserError, match=r"^cat\.png is no image: remove it$"):
        next(iter(loader))


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_sample_rng_depends_on_the_key_and_leaves_no_trace():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    plain = [draw(), draw()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = draw()
    drawn = []
    for key in [(0, 0, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]:
        with sample_rng() as begin:
            draw()
            begin(*key)
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert all(len({values[k] for values in drawn}) == 4 for k in range(3))
    assert [first, draw()] == plain


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**63 - 1))
def test_loaders_draw_nothing_from_torch(seed):
    from stableqat.data import ImageDataModule

    data = ImageDataModule(batch_size=8, seed=seed)
    data.setup()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    assert torch.equal(torch.rand(3), expected)


def test_importing_the_data_modules_imports_no_data_library():
    heavy = {"datasets", "transformers", "timm", "tokenizers", "sklearn", "torchvision", "PIL", "pyarrow"}
    files = list(Path(stableqat.data.__file__).parent.glob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not heavy & {name.split(".")[0] for name in names}, file
