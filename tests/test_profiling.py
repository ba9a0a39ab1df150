"""Stages of a profile: exclusive, complete, free when nobody collects."""

import time

from memory3.profiling import active, collect, span


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_every_second_is_counted_once():
    begin = time.perf_counter()
    with collect() as profile:
        busy(0.01)
        with span("outer"):
            busy(0.01)
            with span("inner"):
                busy(0.02)
            with span("inner"):
                busy(0.02)
            active().add("counted elsewhere", 0.004)
    whole = time.perf_counter() - begin
    seconds = profile.seconds
    assert set(seconds) == {"outer", "inner", "counted elsewhere", "Python"}
    assert seconds["inner"] >= 0.04 and seconds["Python"] >= 0.01 and seconds["counted elsewhere"] == 0.004
    assert 0 < seconds["outer"] < whole - seconds["inner"]
    assert abs(sum(seconds.values()) - whole) < 0.002


def test_nothing_is_collected_outside():
    with span("alone"):
        assert active() is None
    with collect() as profile, collect() as inner:
        with span("linear"):
            pass
    assert active() is None
    assert "linear" in inner.seconds and "linear" not in profile.seconds


def test_an_error_closes_its_spans():
    with collect() as profile:
        try:
            with span("failing"):
                raise KeyError("x")
        except KeyError:
            pass
        with span("after"):
            pass
    assert set(profile.seconds) == {"failing", "after", "Python"}
