"""Fusion of networks and of language models."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from datamodules import Blobs, SupervisedData
from zoo import LogitsFusion, Network
from zoo.core.errors import UserError
from zoo.core.language_models import LanguageModel
from zoo.core.logit_fusion import fuse
from zoo.weak_to_strong.logits_fusion import FusionProcessor

SMALL = partial(Network, backbone="tiny_mlp", in_channels=1)
V = 12


def method(**arguments) -> LogitsFusion:
    given = {"experts": [SMALL], "bases": [SMALL], "allow_untrained_experts": True, **arguments}
    made = LogitsFusion(network=SMALL, num_classes=3, **given)
    made.configure_model()
    return made.eval()


def test_logits_are_fused() -> None:
    x = torch.randn(6, 1, 8, 8)
    fusion = method(experts=[SMALL, SMALL], objective="symmetric", shift="max", max_weight=1.5)
    parts = fusion.network(x), [expert(x) for expert in fusion.experts], [fusion.bases[0](x)]
    torch.testing.assert_close(fusion(x), fuse(*parts, "dynamic", "symmetric", "max", 1.5))
    alone = method(fusion_weights=0.0)
    assert torch.equal(alone(x), alone.network(x))
    static = method(fusion_weights=[0.5])
    torch.testing.assert_close(static(x), static.network(x) + 0.5 * (static.experts[0](x) - static.bases[0](x)))


def test_a_large_network_that_is_the_base_becomes_the_expert() -> None:
    fusion, x = method(), torch.randn(6, 1, 8, 8)
    fusion.network.load_state_dict(fusion.bases[0].module.state_dict())
    torch.testing.assert_close(fusion(x).softmax(1), fusion.experts[0](x).softmax(1), atol=1e-4, rtol=0)


def test_only_the_large_network_learns(tmp_path) -> None:
    fusion = method()
    data = SupervisedData(Blobs(num_classes=3, samples=60), batch_size=8, steps=3)
    before = {name: value.clone() for name, value in fusion.state_dict().items()}
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False, max_epochs=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(fusion, data)
    after = fusion.state_dict()
    moved = {name.partition(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"network"}
    metrics = trainer.test(fusion, data, verbose=False)[0]
    assert metrics.keys() == {"test/accuracy", "test/large_accuracy", "test/expert_0_accuracy"}
    logits, labels = [], []
    for batch in trainer.test_dataloaders["test"]:
        batch = data.on_after_batch_transfer(dict(batch), 0)
        logits.append([fusion(batch["image"]), fusion.network(batch["image"]), fusion.experts[0](batch["image"])])
        labels.append(batch["label"])
    for made, name in zip(zip(*logits, strict=True), ("accuracy", "large_accuracy", "expert_0_accuracy"), strict=True):
        expected = (torch.cat(made).argmax(1) == torch.cat(labels)).float().mean()
        torch.testing.assert_close(torch.tensor(metrics[f"test/{name}"]), expected)


def test_refuses_experts_that_never_learned(tmp_path) -> None:
    fusion = method(allow_untrained_experts=False)
    with pytest.raises(UserError, match="random weights"):
        fusion.on_test_start()
    torch.save(fusion.bases[0].module.state_dict(), tmp_path / "weights.pt")
    trained = partial(SMALL, weights=str(tmp_path / "weights.pt"))
    method(experts=[trained], bases=[trained], allow_untrained_experts=False).on_predict_start()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bases": [SMALL] * 3}, "3 bases for 1 experts"),
        ({"fusion_weights": "dynamical"}, "Did you mean 'dynamic'"),
        ({"fusion_weights": [1.0, 2.0]}, "one for each expert"),
        ({"objective": "backward"}, "objective='backward'"),
        ({"shift": "sum"}, "shift='sum'"),
        ({"max_weight": 0.0}, "max_weight=0.0"),
    ],
)
def test_refuses(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        method(**arguments)


class TestGeneration:
    @pytest.fixture
    def models(self) -> list[LanguageModel]:
        """A large one, two experts and their base."""
        sizes = [("llama", 32, 3), ("gpt2", 16, 1), ("gpt2", 16, 1), ("gpt2", 16, 1)]  # gpt2 knows absolute positions
        made = [LanguageModel(V, width=w, layers=n, heads=2, model=form).eval() for form, w, n in sizes]
        for model in made[1:]:
            model.model.transformer.wpe.weight.data *= 30
        for model in made:  # sharper than an initialisation is
            model.model.get_output_embeddings().weight.data *= 60
        return made

    @pytest.fixture
    def prompts(self) -> Tensor:
        prompts = torch.randint(1, V, (5, 6))
        prompts[0, :3] = prompts[1, :1] = -100
        return prompts

    def by_hand(self, models, prompts: Tensor, length: int, **arguments) -> Tensor:
        large, *experts, base = models
        ids = prompts
        for _ in range(length):
            with torch.no_grad():
                logits = fuse(large(ids), [expert(ids) for expert in experts], [base(ids)], **arguments)
            ids = torch.cat([ids, logits.argmax(1, keepdim=True)], dim=1)
        return ids[:, prompts.shape[1] :]

    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("experts", [1, 2])
    def test_every_step_is_fused(self, models, prompts, use_cache, experts) -> None:
        models = [models[0], *models[1 : 1 + experts], models[3]]
        expected = self.by_hand(models, prompts, 7, objective="symmetric")
        large, *small, base = models
        processor = FusionProcessor(
            [expert.model for expert in small], [base.model], (prompts >= 0).long(), objective="symmetric",
            use_cache=use_cache,
        )  # fmt: skip
        made = large.generate(prompts, 7, processors=[processor])
        assert not torch.equal(made, large.generate(prompts, 7)), "the experts say something"
        before_end = (expected == 0).cumsum(1) - (expected == 0).long() == 0
        assert torch.equal(made[before_end], expected[before_end])
        again = large.generate(prompts, 7, processors=[processor])
        assert torch.equal(made, again), "a new prompt clears the caches"

    def test_weight_zero_and_a_large_model_that_is_the_base(self, models, prompts) -> None:
        large, expert, _, base = models
        mask = (prompts >= 0).long()
        nothing = FusionProcessor([expert.model], [base.model], mask, weights=0.0)
        assert torch.equal(large.generate(prompts, 5, processors=[nothing]), large.generate(prompts, 5))
        whole = FusionProcessor([expert.model], [base.model], mask)
        assert torch.equal(base.generate(prompts, 5, processors=[whole]), expert.generate(prompts, 5))

    def test_small_models_read_every_token_once(self, models) -> None:
        large, expert, _, base = models
        lengths = []
        expert.model.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        processor = FusionProcessor([expert.model], [base.model])
        made = large.generate(torch.randint(1, V, (1, 6)), 4, processors=[processor])
        assert lengths[0] == 6
        assert lengths[1:] == [1] * (int((made >= 0).sum()) - 1)

    def test_other_texts_of_the_next_length_are_not_taken_for_the_same(self, models) -> None:
        _, expert, _, base = models
        processor = FusionProcessor([expert.model], [base.model])
        scores = torch.randn(2, V)
        ids, others = torch.randint(1, V, (2, 5)), torch.randint(1, V, (2, 6))
        processor(ids, scores)
        moved = torch.cat([ids.flip(0), ids[:, :1]], dim=1)  # beams change places
        for x in (others, moved):
            fresh = FusionProcessor([expert.model], [base.model])(x, scores)
            assert torch.equal(processor(x, scores), fresh)
            processor(ids, scores)
