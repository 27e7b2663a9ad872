"""What users may write, and what they are told when it cannot be read."""

import argparse

import pytest

import foveal as fv
from foveal._errors import PatternError, ScoreError, UnknownNameError
from foveal.cli import _arguments as arguments


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("Causal", fv.Causal()),
        ("Sliding(512)", fv.Sliding(512)),
        ("fv.Sliding(left=3, right=-0)", fv.Sliding(3)),
        (
            "Neighborhood(window=(3, 5), causal=(True, False))",
            fv.Neighborhood((3, 5), causal=(True, False)),
        ),
        ("Neighborhood(5, border='wrap')", fv.Neighborhood(5, border="wrap")),
        ("Axial(-1)", fv.Axial(-1)),
        ("Sliding(3) & Causal()", fv.Sliding(3) & fv.Causal()),
        (
            "Sliding(3) & (Strided(4) | Fixed(8, 2))",
            fv.Sliding(3) & (fv.Strided(4) | fv.Fixed(8, 2)),
        ),
        (" Partition(8, shift=4) ", fv.Partition(8, shift=4)),
    ],
)
def test_expressions_are_patterns(text: str, pattern: fv.Pattern) -> None:
    assert arguments.pattern(text) == pattern


@pytest.mark.parametrize("pattern", [fv.Sliding(3, 4, 5), fv.Neighborhood((2, 3), border="clip")])
def test_a_written_key_reads_as_its_pattern(pattern: fv.Pattern) -> None:
    assert arguments.pattern(pattern.key) == pattern


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Sliding(3", "does not parse"),
        ("", "does not parse"),
        ("Sliding()", r"missing a required argument: 'left'; Sliding\(left, right=0"),
        ("Sliding(1, 2, 3, 4)", "too many positional"),
        ("Sliding(lft=3)", "missing a required argument"),
        ("Sliding(-1)", "at least 0"),
        ("Sliding(3) + Causal()", "joined by & and | only"),
        ("Sliding(__import__('os').getpid())", "not a literal"),
        ("Sliding(*[1])", "not a literal"),
        ("Sliding(**{'left': 1})", r"\*\* is not understood"),
        ("[Sliding(3)]", "is not a pattern"),
        ("(lambda: 1)()", "is not a pattern"),
        ("Sliding(3).left", "is not a pattern"),
        ("Sliding(" + "1" * 3000 + ")", "at most 2000 characters"),
    ],
)
def test_what_is_no_pattern_is_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(PatternError, match=sentence):
        arguments.pattern(text)


def test_unknown_classes_come_with_close_names() -> None:
    with pytest.raises(UnknownNameError, match="did you mean Sliding"):
        arguments.pattern("Slidng(3)")


def test_every_public_pattern_of_numbers_can_be_written() -> None:
    classes = {name for name in fv.__all__ if isinstance(getattr(fv, name), type)}
    patterns = {name for name in classes if issubclass(getattr(fv, name), fv.Pattern)}
    assert set(arguments.PATTERNS) == patterns - {
        "Pattern",
        "Blocks",
        "Chosen",
        "Lifetimes",
        "Rows",
        "Tree",
    }


def test_scores() -> None:
    assert arguments.score("Softmax(soft_cap=30.0)").key == fv.Softmax(soft_cap=30.0).key
    with pytest.raises(ScoreError, match="not a literal"):
        arguments.score("Softmax(scale=x)")
    with pytest.raises(UnknownNameError):
        arguments.score("Sotfmax()")


@pytest.mark.parametrize(
    ("text", "grid"),
    [("24x24", (24, 24)), ("4096", (4096,)), ("3,4,5", (3, 4, 5)), ("2X8", (2, 8))],
)
def test_grids(text: str, grid: tuple[int, ...]) -> None:
    assert arguments.grid(text) == grid


@pytest.mark.parametrize("text", ["", "0", "4x0", "a", "1x2x3x4", "-3", "3.5", "4x"])
def test_what_is_no_grid(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="one to three positive lengths"):
        arguments.grid(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("window=7", 7),
        ("window=7x5", (7, 5)),
        ("window=(7, 5)", (7, 5)),
        ("causal=true", True),
        ("causal=True", True),
        ("kind=fixed", "fixed"),
        ("scale=0.5", 0.5),
    ],
)
def test_options(text: str, value: object) -> None:
    assert arguments.option(text) == (text.partition("=")[0], value)


def test_options_need_a_name() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=VALUE"):
        arguments.option("7")
    assert arguments.lengths("3,0,4") == (3, 0, 4)
    with pytest.raises(argparse.ArgumentTypeError):
        arguments.lengths("3,-1")
    with pytest.raises(argparse.ArgumentTypeError):
        arguments.positive("0")
