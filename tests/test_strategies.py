"""What spans processes: the same weights from two ranks as from one, sharded or not."""

import os
import socket
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import EMATeacher
from zoo import FixMatch, Network
from zoo.policies import MovingAlignment, Threshold

STEPS = 3


def batches(rows: slice) -> list[dict[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def views() -> Tensor:
        return torch.randn(8, 1, 8, 8, generator=generator)

    items = []
    for _ in range(STEPS):
        labeled = {"image": views(), "label": torch.randint(3, (8,), generator=generator)}
        unlabeled = {"weak": views(), "strong": views()}
        items.append(
            {
                r: {k: v[rows] for k, v in d.items()}
                for r, d in zip(("labeled", "unlabeled"), (labeled, unlabeled), strict=True)
            }
        )
    return items


def fixmatch() -> FixMatch:
    torch.manual_seed(0)
    return FixMatch(
        network=partial(Network, backbone="tiny_mlp", in_channels=1),
        num_classes=3,
        policy=partial(Threshold, threshold=0.34, alignment=MovingAlignment),
        momentum=0.5,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    )


def fit(rows: slice, **arguments) -> tuple[FixMatch, Trainer]:
    trainer = Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[EMATeacher()], **arguments,
    )  # fmt: skip
    method = fixmatch()
    trainer.fit(method, DataLoader(batches(rows), batch_size=None))
    return method, trainer


@pytest.fixture(scope="module")
def joint() -> dict[str, Tensor]:
    """The weights of one process on the joint batch."""
    return fit(slice(None), devices=1)[0].state_dict()


def sharded_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    method, _ = fit(slice(rank * 4, rank * 4 + 4), devices=2, strategy=strategy)
    kinds = {type(p).__name__ for p in method.parameters()}
    state = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in method.state_dict().items()}
    torch.save({"kinds": sorted(kinds), "state": state}, f"{folder}/{rank}.pt")


def test_sharding_gives_the_weights_of_one_process(joint, tmp_path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.start_processes(sharded_rank, (port, str(tmp_path)), nprocs=2, start_method="fork")
    for rank in range(2):
        saved = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert saved["kinds"] == ["DTensor"]
        assert saved["state"].keys() == joint.keys()
        for name, value in joint.items():
            torch.testing.assert_close(saved["state"][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_two_ranks_give_the_weights_of_one_process(joint, tmp_path) -> None:
    class Rank(DataLoader):
        """Each rank's rows, chosen when the rank iterates."""

        def __iter__(self):
            rank = torch.distributed.get_rank()
            return iter(batches(slice(rank * 4, rank * 4 + 4)))

    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_steps=STEPS, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[EMATeacher()],
    )  # fmt: skip
    method = fixmatch()
    method.configure_model()  # a forked child's modules do not come back, their weights do
    trainer.fit(method, Rank(range(STEPS), batch_size=None))
    for name, value in joint.items():
        torch.testing.assert_close(method.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
