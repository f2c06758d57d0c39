"""The benchmarks' own arithmetic: percentiles, ratios of rounds, and who fails the run."""

from __future__ import annotations

import os
import random
import threading
import time

import pytest

from tests.bench.load import _events
from tests.bench.processes import cpu_s
from tests.bench.results import Bound, Number, Weight, median_ratio, missed, percentile


def test_a_percentile_does_not_depend_on_the_order_and_lies_between_its_neighbours() -> None:
    values = [float(number) for number in range(101)]
    random.Random(1).shuffle(values)
    assert percentile(values, 50) == pytest.approx(50)
    assert percentile(values, 99) == pytest.approx(99)
    assert percentile([1.0, 2.0], 50) == pytest.approx(1.5)
    assert percentile([7.0], 99) == 7.0


def test_one_late_value_in_a_thousand_is_beyond_the_99th_percentile() -> None:
    assert percentile([1.0] * 999 + [500.0], 99) == pytest.approx(1.0)
    assert percentile([1.0] * 980 + [500.0] * 20, 99) == pytest.approx(500.0)


def test_a_ratio_compares_what_was_measured_in_the_same_round() -> None:
    # The machine was busy in the second round, for both.
    assert median_ratio([10.0, 100.0, 10.0], [5.0, 50.0, 5.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="zip"):
        median_ratio([1.0], [1.0, 2.0])


def test_only_a_number_that_was_asked_for_fails_the_run() -> None:
    asked, goal = Bound(2.0), Bound(2.0, Weight.GOAL)
    over = [Number("a", 2.1, "ms", asked), Number("b", 2.1, "ms", goal), Number("c", 9, "ms")]
    within = [Number("a", 2.0, "ms", asked), Number("b", 2.0, "ms", goal)]
    assert [number.remark for number in (*over, *within)] == ["MISSED", "not reached", "", "", ""]
    assert missed(over) == 1
    assert missed(within) == 0


def test_an_event_is_counted_once_wherever_it_was_cut() -> None:
    text = b'data: {"a": 1}\n\ndata: {"b": "x"}\n\ndata: [DONE]\n\n'
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            tail, counted = b"", 0
            for part in (text[:first], text[first:second], text[second:]):
                counted += _events(tail, part)
                tail = (tail + part)[-14:]
            assert counted == 3, (first, second)


def test_the_time_of_all_threads_of_a_process_counts() -> None:
    def work() -> None:
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass

    before, own = cpu_s([os.getpid()]), time.process_time()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cpu_s([os.getpid()]) - before == pytest.approx(time.process_time() - own, abs=0.02)
    assert cpu_s([os.getpid()]) - before >= 0.1
