"""What the exercises say to an answer, and every exercise of every notebook done as its solution says."""

from __future__ import annotations

import pytest

from s2d.lab.exercises import check


@pytest.mark.parametrize(
    ("answer", "truth", "hints", "says", "is_right"),
    [
        (None, 3.0, "", "q: not answered yet", None),
        (3.0, 3.0, "", "q: 3.0 is right", True),
        (2.98, 3.0, "", "q: 2.98 is right", True),
        (3, 3.0, "", "q: 3 is right", True),
        (2.0, 3.0, {"low": "look up", "high": "look down"}, "q: 2.0 is too low; hint: look up", False),
        (9.0, 3.0, {"low": "look up", "high": "look down"}, "q: 9.0 is too high; hint: look down", False),
        (
            9.0,
            3.0,
            {9.0: "that is its square", "high": "look down"},
            "q: 9.0 is too high; hint: that is its square",
            False,
        ),
        ("fc1", "fc2", "which reads the wide side?", "q: fc1 is not it; hint: which reads the wide side?", False),
        ("fc1", "fc2", {"fc1": "it writes it"}, "q: fc1 is not it; hint: it writes it", False),
        (True, 3.0, "a number", "q: True is not it; hint: a number", False),
        ([1, 2.001], [1, 2.0], "", "q: [1, 2.001] is right", True),
        ([1], [1, 2.0], "", "q: [1] is not it", False),
        ("three", 3.0, {"low": "look up"}, "q: three is not it", False),
    ],
)
def test_an_answer_gets_what_it_deserves(answer, truth, hints, says, is_right, capsys) -> None:
    assert check("q", answer, truth, hints=hints) is is_right
    assert capsys.readouterr().out == says + "\n"
