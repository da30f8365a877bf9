import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import NonFiniteGuard, NonFiniteLoss


def poisoned(method, index, kind="plain"):
    model = method(kind)
    model.poison = index
    return model


@pytest.mark.parametrize("every", [1, 4, 100])
def test_names_the_first_bad_batch(method, points, trainer, every) -> None:
    # index 109 is in the third batch of each epoch; every=100 is read at the end of the epoch
    with pytest.raises(NonFiniteLoss, match=r"at step 2 \(batch 2 of epoch 0\).*labeled: 108, 109, 110, 111") as caught:
        trainer(NonFiniteGuard(every)).fit(poisoned(method, 109), points())
    assert caught.value.step == 2
    assert caught.value.indices == {"labeled": [108, 109, 110, 111]}
    assert caught.value.checkpoint is None


def test_accumulation_and_manual_optimization(method, points, trainer) -> None:
    with pytest.raises(NonFiniteLoss, match=r"at step 0 \(batch 1 of epoch 0\)"):
        trainer(NonFiniteGuard(), accumulate_grad_batches=3).fit(poisoned(method, 106), points())
    with pytest.raises(NonFiniteLoss, match=r"at step 2 \(batch 1 of epoch 0\)"):
        trainer(NonFiniteGuard()).fit(poisoned(method, 106, "manual"), points())


def test_reads_the_device_only_when_asked(method, points, trainer, monkeypatch) -> None:
    read = []
    original = NonFiniteGuard._read
    monkeypatch.setattr(NonFiniteGuard, "_read", lambda self, *a: (read.append(a[0].global_step), original(self, *a)))
    trainer(NonFiniteGuard(4), limit_val_batches=0).fit(method(), points())
    assert read == [4, 6, 6]  # every fourth batch, the end of the epoch, the end of training


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_bad_state_replaces_no_checkpoint(method, points, trainer, tmp_path, weights_only) -> None:
    saver = ModelCheckpoint(
        tmp_path, "kept", every_n_train_steps=1, save_weights_only=weights_only, enable_version_counter=False
    )
    with pytest.raises(NonFiniteLoss) as caught:
        trainer(NonFiniteGuard(100), saver, enable_checkpointing=True).fit(poisoned(method, 109), points())
    kept = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    assert all(torch.isfinite(value).all() for value in kept["state_dict"].values())
    assert caught.value.checkpoint == tmp_path / "kept.ckpt"


def test_weights_that_a_finite_loss_broke(method, points, trainer, tmp_path) -> None:
    class Break(Callback):
        """Stands for a gradient that was not finite."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            if trainer.global_step == 3:
                pl_module.network.layer.weight.grad[0, 0] = torch.nan

    saver = ModelCheckpoint(tmp_path, "kept", every_n_train_steps=2, enable_version_counter=False)
    with pytest.raises(NonFiniteLoss, match=r"a weight became NaN or infinite at step 3 .*112, 113, 114, 115"):
        trainer(NonFiniteGuard(100), Break(), saver, enable_checkpointing=True).fit(method(), points())
    assert torch.load(tmp_path / "kept.ckpt", weights_only=True)["global_step"] == 2


def test_gradients(method, points, trainer) -> None:
    class Break(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            if trainer.global_step == 3:
                pl_module.network.layer.weight.grad[0, 0] = torch.inf

    with pytest.raises(NonFiniteLoss, match="the loss or a gradient became NaN or infinite at step 3"):
        trainer(Break(), NonFiniteGuard(100, gradients=True)).fit(method(), points())


def test_a_save_by_hand_is_refused(method, points, trainer, tmp_path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    with pytest.raises(NonFiniteLoss):
        trainer(Save(), NonFiniteGuard(100)).fit(poisoned(method, 109), points())
    # also for a callback that comes before the guard
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["1.ckpt", "2.ckpt"]


def test_a_good_run_can_be_saved_later(method, points, trainer, tmp_path) -> None:
    trained = trainer(NonFiniteGuard(2), max_epochs=2)
    trained.fit(method(), points())
    trained.save_checkpoint(tmp_path / "end.ckpt")
    again = trainer(NonFiniteGuard(2), max_epochs=3)
    again.fit(method(), points(), ckpt_path=tmp_path / "end.ckpt")
    assert again.global_step == 18


def test_all_ranks_stop_together(method, points, trainer, tmp_path, two_ranks) -> None:
    class Recording(NonFiniteGuard):
        def _read(self, trainer, module=None) -> None:
            try:
                super()._read(trainer, module)
            except NonFiniteLoss as error:
                (tmp_path / f"{trainer.global_rank}.txt").write_text(str(error))
                trainer.strategy.barrier()  # the first process to end has the others killed
                raise

    with pytest.raises(Exception, match="NonFiniteLoss"):
        trainer(Recording(2), **two_ranks).fit(poisoned(method, 109), points(8 * 6))
    texts = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert all("109" in text for text in texts)
    assert all("on rank" in text for text in texts)


def test_every_n_steps_is_checked() -> None:
    with pytest.raises(ValueError, match="every_n_steps=0"):
        NonFiniteGuard(0)
