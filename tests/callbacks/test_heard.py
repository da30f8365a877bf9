"""What callbacks hear of a method's own forward."""

import torch
from torch import nn

from callbacks.heard import HeardLogits


def test_first_and_last_logits_with_their_labels() -> None:
    module, heard, label = nn.Identity(), HeardLogits(), torch.tensor([0, 1])
    heard.listen(module)
    outputs = [torch.full((2, 3), float(number)) for number in range(3)]
    for output in outputs:
        module(output)
    assert [(logits[0, 0].item(), found is label) for logits, found in heard.take({"label": label})] == [
        (0.0, True),
        (2.0, True),
    ]
    assert heard.take({"label": label}) == []  # forgotten
    heard.leave()
    module(outputs[0])
    assert heard.take({"label": label}) == []
    assert not module._forward_hooks


def test_passes_over_what_are_no_logits_of_labelled_samples() -> None:
    module, heard, label = nn.Identity(), HeardLogits(), torch.tensor([0, 1])
    heard.listen(module)
    for output in (torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), (torch.zeros(2, 3),)):
        module(output)
    assert heard.take({"label": label}) == []
    for batch in ({}, torch.zeros(2), {"label": label[:1]}, {"label": [0, 1]}):
        module(torch.zeros(2, 3))
        assert heard.take(batch) == []
    module(torch.zeros(2, 3))
    other = nn.Identity()
    heard.listen(other)
    assert heard.take({"label": label}) == []
    assert not module._forward_hooks
    heard.leave()
