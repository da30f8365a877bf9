from jsonargparse import ArgumentParser

from zoo.parser import explain


def test_two_classes_of_one_name_are_both_named() -> None:
    message = (
        'Parser key "model":\n  Does not validate against any of the Union subtypes\n  Errors:\n'
        "    - Multiple subclasses with name MixMatch. Give the full class path to avoid ambiguity: zoo.MixMatch,"
        " mine.MixMatch.\n    - Expected a <class 'NoneType'>"
    )
    assert explain(message, ArgumentParser()) == (  # type: ignore[arg-type]
        "model: several classes are called 'MixMatch'; give the full path: zoo.MixMatch, mine.MixMatch"
    )
