from functools import partial
from pathlib import Path

import pytest
import torch

import zoo
from zoo import FlexMatch, Network
from zoo.core.weights import WeightsError
from zoo.hub import save_pretrained


def flexmatch(samples: int | None) -> FlexMatch:
    method = FlexMatch(network=partial(Network, backbone="lenet", in_channels=1), num_classes=3)
    method.configure_model()
    if samples is not None:
        method.policy.prepare(torch.arange(samples))
    return method


def test_weights_with_one_class_per_sample_load_where_the_data_is_unknown(tmp_path: Path) -> None:
    method = flexmatch(20)
    method.policy(9.0 * torch.eye(3), index=torch.tensor([4, 7, 9]))
    save_pretrained(method, tmp_path)
    loaded = zoo.load(tmp_path)
    assert torch.equal(loaded.policy.classes, method.policy.classes)
    assert torch.equal(loaded.policy.thresholds(), method.policy.thresholds())
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(loaded.eval()(x), method.eval()(x))


def test_other_shapes_still_have_to_fit(tmp_path: Path) -> None:
    method = flexmatch(20)
    method.policy.classes = method.policy.classes[:, None]
    with pytest.raises(WeightsError, match=r"policy\.classes"):
        zoo.core.weights.load_into(flexmatch(None), method.state_dict())


def test_ddp_does_not_send_a_row_for_every_sample_around_at_every_step(on_ranks) -> None:
    def sent(rank: int) -> list[str]:
        method = flexmatch(None)
        wrapped = torch.nn.parallel.DistributedDataParallel(method)
        method.policy.prepare(torch.arange(1000))  # after the wrapping, as in a training
        wrapped._assign_modules_buffers()
        return sorted(wrapped.named_module_buffers)

    (names,) = on_ranks(sent, world=1)
    assert "policy.counts" in names
    assert "policy.classes" not in names
