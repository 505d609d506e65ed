"""Which effort a recall asks for, from a measured curve."""

import pytest

from unlabeled.errors import UserError
from unlabeled.search.graph import effort_for

CURVE = [
    {"effort": 16, "recall": 0.90},
    {"effort": 32, "recall": 0.94},
    {"effort": 64, "recall": 0.98},
    {"effort": 128, "recall": 0.98},
    {"effort": 192, "recall": 0.9995},
]


@pytest.mark.parametrize(
    ("recall", "effort"),
    [(0.5, 16), (0.9, 16), (0.92, 24), (0.94, 32), (0.95, 40), (0.98, 64), (0.9995, 192)],
)
def test_effort_lies_on_the_line_between_two_measured_ones(recall: float, effort: int) -> None:
    assert effort_for(CURVE, recall, 10) == effort
    assert effort_for(CURVE, recall, 30) == effort + 30
    assert effort_for(CURVE, recall, 1) == effort


def test_a_recall_that_is_out_of_reach_is_refused() -> None:
    with pytest.raises(UserError, match=r"reaches a recall of 1\.000, not 1;"):
        effort_for(CURVE, 1.0, 10)
