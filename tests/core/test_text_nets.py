import pytest
import torch
from torch import nn

from zoo.core.backbones import create_backbone
from zoo.core.network import Network
from zoo.core.text_nets import BagOfWords, TextCNN

NAMES = ["bag_of_words", "text_cnn"]


def ids():
    rows = torch.randint(1, 50, (3, 9))
    rows[1, 5:] = 0
    rows[2, 1:] = 0  # shorter than every window
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name):
    network = create_backbone(name, arguments={"vocabulary": 50, "width": 8}).eval()
    x = ids()
    wider = torch.cat([x, torch.zeros(3, 20, dtype=torch.int64)], 1)
    assert network.features(x).shape == (3, network.num_features)
    assert network.tokens(x).shape == (3, 9, network.num_dense_features)
    torch.testing.assert_close(network.features(wider), network.features(x))
    torch.testing.assert_close(network.features(x[1:2, :5]), network.features(x)[1:2])
    assert torch.equal(network({"input_ids": x}), network(x))
    with pytest.raises(ValueError, match="text has no map"):
        network.dense(x)


def test_a_bag_is_the_mean_of_its_words_in_any_order():
    network = BagOfWords(50, 8)
    x = torch.tensor([[4, 9, 9, 0]])
    weight = network.embedding.weight
    torch.testing.assert_close(network(x)[0], (weight[4] + 2 * weight[9]) / 3)
    torch.testing.assert_close(network(torch.tensor([[9, 0, 4, 9]])), network(x))
    assert network(torch.zeros(1, 4, dtype=torch.int64)).eq(0).all()


def test_the_convolution_against_its_definition():
    network = TextCNN(30, width=5, maps=4, windows=(2, 3)).double()
    x = torch.randint(1, 30, (1, 6))
    words = network.embedding(x)[0]
    expected = []
    for layer in network.windows:
        window = layer.kernel_size[0]
        before = (window - 1) // 2
        zeros = words.new_zeros
        padded = torch.cat([zeros(before, 5), words, zeros(window - 1 - before, 5)])
        positions = [(layer.weight * padded[n : n + window].T).sum((1, 2)) + layer.bias for n in range(6)]
        expected.append(torch.stack(positions).relu().max(0).values)
    torch.testing.assert_close(network(x)[0], torch.cat(expected))
    assert not torch.allclose(network(x.flip(1)), network(x))  # order matters


@pytest.mark.parametrize("name", NAMES)
def test_as_a_network(name):
    network = Network(3, name, arguments={"vocabulary": 50, "width": 8})
    network(ids()).square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
    assert network.backbone.model.embedding.weight.grad[0].eq(0).all()
    assert (network.backbone.vocabulary, network.backbone.pad) == (50, 0)
    for wrong in (ids().float(), torch.zeros(2, 1, 28, 28), ["text"]):
        with pytest.raises(ValueError, match=r"text is token ids \(B, N\) int64"):
            network(wrong)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("text_cnn", {"vocabulary": 0}, "TextCNN: vocabulary=0 must be at least 1"),
        ("text_cnn", {"pad": 20_000}, "pad=20000 must be an id below vocabulary=20000"),
        ("text_cnn", {"windows": ()}, "must be at least 1"),
        ("bag_of_words", {"maps": 3}, "bag_of_words: .*unexpected keyword argument 'maps'"),
        ("text_cn", {}, "Did you mean 'text_cnn'"),
    ],
)
def test_mistakes_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(name, arguments=arguments)


def test_transformers_take_ids_alone(tmp_path):
    from transformers import BertConfig

    settings = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertConfig(**settings, intermediate_size=24, max_position_embeddings=20).save_pretrained(tmp_path)
    network = Network(3, f"hf:{tmp_path}").eval()
    x = torch.randint(1, 30, (2, 7))
    x[1, 4:] = 0
    assert torch.equal(network(x), network({"input_ids": x, "attention_mask": (x > 0).long()}))
    torch.testing.assert_close(network(x[1:, :4]), network(x)[1:])
    assert network.tokens(x).shape == (2, 7, 16)
    assert (network.backbone.vocabulary, network.backbone.pad) == (30, 0)
