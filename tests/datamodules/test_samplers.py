from collections import Counter

import pytest
import torch

from datamodules import Blobs, SupervisedData
from datamodules.samplers import DomainSampler, EvalSampler, Loader, RepeatSampler, mix
from zoo.core.errors import UserError


def batches(sampler, epoch=0, start=0):
    sampler.set_epoch(epoch)
    return [list(draw) for draw in sampler.batches(start)]


def flat(lists):
    return [index for batch in lists for index in batch]


def test_mix_separates_neighbours_and_is_stable():
    seeds = {mix(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == 900  # the CPU generator reads 32 bits of a seed
    assert mix(0, 1) != mix(1, 0)
    assert mix(3) == mix(3)


def test_exact_number_of_batches_of_exact_size():
    sampler = RepeatSampler(10, batch_size=4, steps=7)
    assert len(sampler) == 7
    assert [len(batch) for batch in sampler] == [4] * 7


def test_every_pass_is_a_new_permutation_that_goes_on_across_epochs():
    sampler = RepeatSampler(10, batch_size=4, steps=5, seed=3)  # 20 samples an epoch: two passes
    stream = flat(batches(sampler, 0)) + flat(batches(sampler, 1))
    passes = [stream[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4


def test_a_pass_crosses_the_border_of_an_epoch():
    sampler = RepeatSampler(10, batch_size=3, steps=2)  # 6 samples an epoch
    stream = [index for epoch in range(5) for index in flat(batches(sampler, epoch))]
    assert Counter(stream) == Counter(dict.fromkeys(range(10), 3))


def test_set_smaller_than_the_batch_is_passed_through_several_times():
    batch = next(iter(RepeatSampler(3, batch_size=9, steps=1)))
    assert Counter(batch) == {0: 3, 1: 3, 2: 3}


def test_ranks_are_disjoint_and_together_equal_one_process():
    ranks = [RepeatSampler(24, 4, steps=3, seed=5, num_replicas=2, rank=rank) for rank in range(2)]
    for epoch in range(3):
        first, second = (batches(sampler, epoch) for sampler in ranks)
        assert not set(flat(first)) & set(flat(second))  # an epoch is one pass here
        assert sorted(flat(first) + flat(second)) == list(range(24))
        one = batches(RepeatSampler(24, 8, steps=3, seed=5), epoch)
        assert [a + b for a, b in zip(first, second, strict=True)] == one


def test_epoch_k_is_the_same_whoever_asks():
    fresh, used = RepeatSampler(17, 5, 4, seed=1), RepeatSampler(17, 5, 4, seed=1)
    for epoch in range(3):
        batches(used, epoch)
    assert batches(fresh, 3) == batches(used, 3)
    assert batches(fresh, 3, start=2) == batches(used, 3)[2:]
    assert batches(fresh, 3) != batches(RepeatSampler(17, 5, 4, seed=2), 3)


def test_draws_carry_seeds_that_differ_by_step_epoch_and_rank():
    seeds = set()
    for rank in range(2):
        sampler = RepeatSampler(8, 2, steps=3, num_replicas=2, rank=rank)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            seeds |= {draw.seed for draw in sampler}
    assert len(seeds) == 12


def test_errors():
    with pytest.raises(ValueError, match="the set is empty"):
        RepeatSampler(0, 4, 1)
    with pytest.raises(ValueError, match="batch_size=0"):
        RepeatSampler(4, 0, 1)
    with pytest.raises(ValueError, match="1 samples cannot be shared out over 2"):
        EvalSampler(1, 4, num_replicas=2, rank=0)


@pytest.mark.parametrize("size", [2, 3, 7, 21, 64, 100])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("batch", [1, 5, 16])
def test_evaluation_sees_everything_once_with_equally_many_batches(size, world, batch):
    shares = [list(EvalSampler(size, batch, num_replicas=world, rank=rank)) for rank in range(world)]
    assert sorted(flat(flat(shares))) == list(range(size))
    assert len({len(share) for share in shares}) == 1
    assert all(len(one) > 0 for share in shares for one in share)
    assert max(len(one) for share in shares for one in share) <= batch + (world > 1)
    assert len(EvalSampler(size, batch, num_replicas=world, rank=0)) == len(shares[0])


def test_evaluation_by_one_process_is_in_order():
    assert flat(EvalSampler(10, 4)) == list(range(10))


def loader(workers=0, steps=6):
    samples = Blobs(samples=20).train()
    return Loader(samples, RepeatSampler(samples, 4, steps, seed=1), num_workers=workers)


def indices(batch):
    return batch["index"].tolist()


def test_state_resumes_behind_the_last_batch_taken():
    whole = [indices(batch) for batch in loader()]
    first = loader()
    iterator = iter(first)
    taken = [indices(next(iterator)) for _ in range(2)]
    state = first.state_dict()
    assert state == {"epoch": 0, "position": 2}
    second = loader()
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert taken + [indices(batch) for batch in second] == whole
    assert [indices(batch) for batch in second] == whole  # once only: the next pass starts at the start


def test_state_of_a_finished_epoch_leaves_the_next_alone():
    first = loader()
    list(first)
    second = loader()
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(1)
    assert len(list(second)) == 6


def test_an_iterator_starts_at_its_first_batch():
    """Lightning makes the iterator before it calls set_epoch."""
    one, other = loader(), loader()
    iterator = iter(one)
    one.sampler.set_epoch(4)
    other.sampler.set_epoch(4)
    assert indices(next(iterator)) == indices(next(iter(other)))


def test_workers_change_nothing():
    alone, helped = loader(), loader(workers=1)
    for epoch in range(2):
        alone.sampler.set_epoch(epoch)
        helped.sampler.set_epoch(epoch)
        for a, b in zip(alone, helped, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_workers_resume():
    whole = [indices(batch) for batch in loader()]
    helped = loader(workers=1)
    helped.load_state_dict({"epoch": 0, "position": 4})
    assert [indices(batch) for batch in helped] == whole[4:]


def test_lightning_leaves_the_sampler_alone(tmp_path):
    from lightning.pytorch import Trainer

    data = SupervisedData(Blobs(), batch_size=4, steps=3)
    data.setup("fit")
    combined = data.train_dataloader()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    from lightning.pytorch.trainer.connectors.data_connector import _process_dataloader
    from lightning.pytorch.trainer.states import RunningStage, TrainerFn

    for one in combined.flattened:
        assert _process_dataloader(trainer, TrainerFn.FITTING, RunningStage.TRAINING, one) is one


def test_every_batch_has_as_many_of_every_domain() -> None:
    domains = torch.tensor([0] * 10 + [2] * 3 + [1] * 6)
    sampler = DomainSampler(domains, 6, 5, seed=1, num_replicas=1, rank=0)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 5
    assert all(domains[torch.tensor(draw)].tolist() == [0, 0, 1, 1, 2, 2] for draw in batches)
    assert sorted(i for draw in batches for i in draw[:2]) == list(range(10))  # a whole pass
    assert list(sampler.batches(3)) == batches[3:]
    assert [draw.seed for draw in sampler.batches(3)] == [draw.seed for draw in batches[3:]]


def test_ranks_share_every_domain_out() -> None:
    domains = torch.arange(2).repeat_interleave(8)
    ranks = [list(DomainSampler(domains, 4, 4, num_replicas=2, rank=rank)) for rank in range(2)]
    assert sorted(i for batches in ranks for draw in batches for i in draw) == sorted(2 * list(range(16)))
    assert all(not set(a) & set(b) for a, b in zip(*ranks, strict=True))


def test_domains_of_one_size_are_not_in_one_order() -> None:
    (draw,) = DomainSampler(torch.arange(2).repeat_interleave(50), 100, 1, num_replicas=1, rank=0)
    assert draw[:50] != [index - 50 for index in draw[50:]]


def test_epochs_of_domains_differ() -> None:
    sampler = DomainSampler(torch.arange(2).repeat_interleave(50), 4, 3, num_replicas=1, rank=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert not {i for d in first for i in d} & {i for d in sampler for i in d}


def test_batches_that_domains_do_not_divide() -> None:
    with pytest.raises(UserError, match="batch_size=5 must be a multiple of 2"):
        DomainSampler(torch.arange(2).repeat(4), 5, 1)
