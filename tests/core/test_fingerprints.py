import torch

from zoo.core.fingerprints import fingerprint


def test_equal_rows_have_equal_numbers_in_any_batch() -> None:
    x = torch.randn(9, 1, 28, 28)
    whole = fingerprint(x)
    assert torch.equal(fingerprint(x[3:5]), whole[3:5])
    assert torch.equal(fingerprint(x.flip(0)), whole.flip(0))


def test_different_rows_have_different_numbers() -> None:
    x = torch.randn(2000, 3)
    y = x[:1].repeat(3, 1)
    y[1, 0], y[2] = y[1, 0].nextafter(torch.tensor(9.0)), y[2].flip(0)
    assert len(fingerprint(torch.cat([x, y[1:]])).unique()) == 2002
