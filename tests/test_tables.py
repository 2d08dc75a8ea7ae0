"""One rule for numbers: as many decimals as the interval justifies, or as the largest number of a column has."""

from __future__ import annotations

import json
import random

import pytest
from mutants import dies

from surgery import tables
from surgery.tables import Estimate, Table, json_text


def estimates() -> list[Estimate]:
    draw = random.Random(0)
    values = [draw.uniform(-1, 1) * 10 ** draw.randint(-5, 4) for _ in range(300)]
    widths = [abs(value) * 10 ** draw.uniform(-2, 1) for value in values]
    return [Estimate(x, x - 0.4 * width, x + 0.6 * width) for x, width in zip(values, widths, strict=True)]


def numbers(text: str) -> list[str]:
    return text.replace(",", "").replace("[", "").replace("]", "").split()


def the_last_decimal_is_no_finer_and_no_coarser_than_the_interval_justifies() -> None:
    for one in estimates():
        texts = numbers(str(one))
        places = {len(text.partition(".")[2]) for text in texts}
        assert len(places) == 1, str(one)
        unit, width = 10.0 ** -places.pop(), one.high - one.low
        assert unit <= 1 if width >= 4 else unit <= width / 4 * (1 + 1e-9), str(one)
        assert unit == 1 or 10 * unit > width / 4, f"{one} has a digit too many"
        for text, value in zip(texts, (one.value, one.low, one.high), strict=True):
            assert abs(float(text) - value) <= unit / 2 * (1 + 1e-6), str(one)


def test_an_estimate_has_the_decimals_of_its_interval():
    the_last_decimal_is_no_finer_and_no_coarser_than_the_interval_justifies()
    assert str(Estimate(0.13492, 0.07509, 0.2123)) == "0.13 [0.08, 0.21]"
    assert str(Estimate(16.72, 8.176, 28.05)) == "17 [8, 28]"
    assert str(Estimate(-0.001, -0.3, 0.3)) == "0.0 [-0.3, 0.3]"  # and not -0.0
    assert str(Estimate(0.5, 0.5, 0.5)) == "0.500 [0.500, 0.500]"


def test_a_mutant_that_forgets_the_interval_dies():
    def mutant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(tables, "places", lambda low, high: 4)

    dies(mutant, the_last_decimal_is_no_finer_and_no_coarser_than_the_interval_justifies)


def column(*cells: tables.Cell) -> list[str]:
    return [row[0] for row in Table("t", ("x",), tuple((cell,) for cell in cells)).texts]


def test_a_column_has_one_number_of_decimals_and_its_largest_number_three_digits():
    assert column(-4.16, -4.129, -4.2641, None) == ["-4.16", "-4.13", "-4.26", ""]
    assert column(23.86, 10.55, 0.8495) == ["23.9", "10.6", "0.8"]
    assert column(2.0, 16.0, 100.0) == ["2", "16", "100"]
    assert column(1234567, 12) == ["1,234,567", "12"]
    assert column(12345.678, 0.25) == ["12,346", "0.2"]  # what would round to zero keeps its first digit
    assert column(0.0345, 0.0003) == ["0.0345", "0.0003"]
    assert column(0.5, 1e-7, 0.0) == ["0.5", "1e-07", "0.0"]
    assert column(0.002, 0.002) == ["0.002", "0.002"]
    assert column(9.544e-12, 7.635e-11) == ["9.54e-12", "7.64e-11"]
    assert column(float("nan"), float("inf"), 0.5) == ["nan", "inf", "0.5"]
    assert column(True, "x") == ["True", "x"]
    assert column(Estimate(17.2, 8, 28), 0, 0.25) == ["17 [8, 28]", "0", "0.25"]


def test_which_columns_hold_numbers():
    table = Table("t", ("a", "b", "c", "d"), (("x", 1, None, Estimate(1, 0, 2)), ("y", None, None, None)))
    assert table.numeric == (False, True, False, True)
    assert str(table).splitlines()[2].startswith("x  1")


def test_numbers_of_a_list_stand_in_one_line():
    told = {"curve": [[1, 0.5], [2, 0.25]], "names": ["a", "b"], "none": [], "deep": {"x": [None, True]}, "text": '"\n'}
    text = json_text(told)
    assert json.loads(text) == told
    assert ' "curve": [[1, 0.5], [2, 0.25]],' in text.splitlines()
    with pytest.raises(ValueError, match="JSON"):
        json_text({"x": float("nan")})
    long = json_text({"many": list(range(1000))})
    assert json.loads(long) == {"many": list(range(1000))}
    assert max(map(len, long.splitlines())) <= 120
