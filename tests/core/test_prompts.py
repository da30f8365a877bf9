import torch

from zoo.core.prompts import answer_rows, prompted, word_ids


class Words:
    """Ids of the letters; 0 fills up, 1 begins and 2 is unknown."""

    special, unknown = (0, 1), 2

    def __call__(self, texts: list[str], length: int) -> torch.Tensor:
        rows = [[1, *(ord(c) - 94 if c.isalpha() else 2 for c in text)][:length] for text in texts]
        return torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.int32)


def test_words_are_cut_and_what_is_no_word_is_left_out() -> None:
    assert word_ids(Words(), "ab?", 6) == [3, 4, 2]
    assert word_ids(Words(), "abcd", 3) == [3, 4]


def test_answers_begin_with_the_sentinel_and_close_with_the_end() -> None:
    assert answer_rows([[5, 6], [7]], 5, 9, 8).tolist() == [[9, 5, 6, 8, -100], [9, 7, 8, -100, -100]]


def test_a_prompt_stands_right_behind_each_text() -> None:
    ids = torch.tensor([[3, 0, 0], [3, 4, 5]])
    found = prompted(ids, torch.tensor([6, 0]), torch.tensor(9), 8, 0)
    assert found.tolist() == [[3, 6, 9, 8, 0, 0, 0], [3, 4, 5, 6, 9, 8, 0]]
