"""Intervals and stamps."""

import pytest

from sd3kit import records


def test_wilson_agrees_with_published_values():
    # Newcombe 1998, table I, method 3 (score without continuity correction): 81/263, 15/148, 0/20, 1/29
    for right, total, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert records.wilson(right, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("right", "total"), [(1, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_share(right, total):
    with pytest.raises(ValueError, match="share"):
        records.wilson(right, total)


def test_a_stamp_says_where_and_how():
    stamp = records.stamp("make test")
    assert stamp["command"] == "make test"
    assert set(stamp) >= {"date", "device", "cores", "versions", "python"}
    assert stamp["versions"]["torch"] != "not installed"
