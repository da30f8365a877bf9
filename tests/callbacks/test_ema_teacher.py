import pytest
import torch
from lightning.pytorch import Callback

from callbacks import EMATeacher
from zoo.core.errors import UserError
from zoo.core.teachers import EMA


class Students(Callback):
    """The student after every batch, which must come before the teacher moves."""

    def __init__(self) -> None:
        self.weights, self.moved = [], []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.weights.append(pl_module.network.layer.weight.detach().clone())
        self.moved.append(int(pl_module.teacher.updates))


class Owed(Callback):
    """Saves at the end of the third batch: before the teacher moves where it stands before EMATeacher."""

    def __init__(self, path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


def test_the_teacher_follows_every_optimizer_step(method, points, trainer) -> None:
    model, seen = method("averaged"), Students()
    model.configure_model()
    expected = model.network.layer.weight.detach().clone()
    trainer(EMATeacher(), seen).fit(model, points())
    for weight in seen.weights:
        expected = 0.5 * expected + 0.5 * weight
    assert seen.moved == [1, 2, 3, 4, 5, 6]
    assert torch.allclose(model.teacher.module.layer.weight, expected)


def test_accumulated_batches_are_one_step(method, points, trainer) -> None:
    model, seen = method("averaged"), Students()
    trainer(EMATeacher(), seen, accumulate_grad_batches=4).fit(model, points())
    assert seen.moved == [0, 0, 0, 1, 1, 2]  # Lightning steps on an epoch's last batch


def test_several_optimizers_are_one_step(method, points, trainer) -> None:
    model = method("manual")
    trained = trainer(EMATeacher())
    trained.fit(model, points())
    assert trained.global_step == 12
    assert int(model.teacher.updates) == 6


def test_nothing_to_do_without_teachers(method, points, trainer) -> None:
    trainer(EMATeacher()).fit(method("plain"), points())


def test_an_unnamed_teacher_is_refused(method, points, trainer) -> None:
    model = method("averaged")
    model.configure_model()
    model.other = EMA(model.network)
    with pytest.raises(UserError, match=r"Averaged\.other is an EMA"):
        trainer(EMATeacher()).fit(model, points())


@pytest.mark.parametrize("owed", [False, True])
def test_resumes_exactly(method, points, trainer, tmp_path, owed) -> None:
    whole = method("averaged")
    trainer(EMATeacher(), max_epochs=2).fit(whole, points())
    path = tmp_path / "three.ckpt"
    save = [Owed(path), EMATeacher()] if owed else [EMATeacher(), Owed(path)]
    trainer(*save, max_steps=3).fit(method("averaged"), points())
    resumed, end = method("averaged"), trainer(EMATeacher(), max_epochs=2)
    data = points()
    # The plain loader starts over in a resumed epoch: skip what was trained on.
    order = [*range(12, 24), *range(12)]
    end.fit(resumed, reordered(data, order), ckpt_path=path)
    assert end.global_step == 12
    assert int(resumed.teacher.updates) == 12
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def reordered(data, order):
    from torch.utils.data import DataLoader, Sampler

    class Once(Sampler):
        def __init__(self) -> None:
            self.epochs = 0

        def __len__(self) -> int:
            return 24

        def __iter__(self):
            self.epochs += 1
            return iter(order if self.epochs == 1 else range(24))

    sampler, collate_fn = Once(), data.train_dataloader().collate_fn
    data.train_dataloader = lambda: DataLoader(data.points, batch_size=4, sampler=sampler, collate_fn=collate_fn)
    return data


def test_two_processes_have_one_teacher(method, points, trainer, tmp_path, two_ranks) -> None:
    class Save(Callback):
        def on_fit_end(self, trainer, pl_module) -> None:
            torch.save(pl_module.teacher.state_dict(), tmp_path / f"{trainer.global_rank}.pt")

    trainer(EMATeacher(), Save(), **two_ranks).fit(method("averaged"), points())
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert int(a["updates"]) == int(b["updates"]) == 3
    assert torch.equal(a["module.layer.weight"], b["module.layer.weight"])


@pytest.mark.parametrize(("precision", "momentum"), [("bf16-true", 0.999), ("bf16-true", 0.9), ("bf16-mixed", 0.999)])
def test_averages_that_16_bit_weights_cannot_follow_are_refused(method, points, trainer, precision, momentum) -> None:
    model = method("averaged")
    model.configure_model()
    model.teacher.momentum = momentum
    run = trainer(EMATeacher(), precision=precision)
    if (precision, momentum) == ("bf16-true", 0.999):
        with pytest.raises(UserError, match=r"momentum=0.999 cannot move in bfloat16 weights"):
            run.fit(model, points())
    else:
        run.fit(model, points())
        assert int(model.teacher.updates) > 0
