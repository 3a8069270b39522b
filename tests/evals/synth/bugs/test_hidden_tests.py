"""Failing tests leave the repository of a task, and issues do not tell where the fault is."""

from __future__ import annotations

from pathlib import Path

from agentkit_evals.synth.bugs.hidden_tests import function_of, path_of, without_tests
from agentkit_evals.synth.bugs.issue import excerpt, issue_text
from agentkit_evals.synth.bugs.package import read_package

TESTS = """\
import pytest


@pytest.mark.parametrize("a", [1])
def test_a(a):
    assert a


class TestB:
    def test_b(self):
        def test_a(): pass


class TestC:
    x = 1

    @staticmethod
    def test_b(): pass
    async def test_c(self): pass
"""


def test_functions_are_removed_with_their_decorators() -> None:
    assert without_tests(TESTS, {"test_a", "test_b"}) == (
        "import pytest\n\n\nclass TestB:\n    pass\n\n\nclass TestC:\n    x = 1\n\n    async def test_c(self): pass\n"
    )


def test_a_test_that_is_not_defined_in_the_file_cannot_be_removed() -> None:
    assert without_tests(TESTS, {"test_a", "test_inherited"}) is None


def test_names_of_both_runners() -> None:
    files = ("tests/test_a.py", "src/pkg/test_b.py")
    assert path_of("tests/test_a.py::A::test_x[a::b]", files) == "tests/test_a.py"
    assert path_of("tests/test_z.py::test_x", files) is None
    assert path_of("test_x (pkg.test_b.B.test_x)", files) == "src/pkg/test_b.py"
    assert path_of("test_x (pkg.test_bb.B.test_x)", files) is None
    assert path_of("setUpClass", files) is None
    assert function_of("tests/test_a.py::A::test_x[a::b]") == "test_x"
    assert function_of("test_y (pkg.test_b.B.test_y)") == "test_y"


PYTEST_OUTPUT = """\
=================================== FAILURES ===================================
__________________________ TestSum.test_sum[values1] ___________________________
tests/test_calc.py:14: in test_sum
    assert total(values) == expected
calc.py:8: in total
    return helper(secret_line)
E   TypeError: unsupported operand
----------------------------- Captured stdout call -----------------------------
noise
=========================== short test summary info ============================
FAILED tests/test_calc.py::TestSum::test_sum[values1] - TypeError: unsup...
"""
UNITTEST_OUTPUT = """\
test_sum (tests.test_calc.SumTest.test_sum) ... FAIL

======================================================================
FAIL: test_sum (tests.test_calc.SumTest.test_sum)
----------------------------------------------------------------------
Traceback (most recent call last):
  File "/workspace/tests/test_calc.py", line 9, in test_sum
    self.assertEqual(total([1]), 1)
  File "/workspace/calc.py", line 5, in total
    return secret_line
           ^^^^^^^^^^^
AssertionError: 2 != 1

----------------------------------------------------------------------
Ran 1 test in 0.001s
"""


def test_excerpts_show_the_check_and_the_error_without_frames_of_the_package() -> None:
    assert excerpt(PYTEST_OUTPUT, "tests/test_calc.py::TestSum::test_sum[values1]") == (
        "    assert total(values) == expected\nE   TypeError: unsupported operand"
    )
    assert excerpt(UNITTEST_OUTPUT, "test_sum (tests.test_calc.SumTest.test_sum)") == (
        "    self.assertEqual(total([1]), 1)\nAssertionError: 2 != 1"
    )
    assert excerpt(UNITTEST_OUTPUT, "test_other (tests.test_calc.SumTest.test_other)") == ""


def test_an_issue_names_a_public_function_but_no_private_one(make_sdist: object) -> None:
    path: Path = make_sdist()  # type: ignore[operator]
    package = read_package(path)
    failing = ["tests/test_calc.py::TestSum::test_sum[values1]"]
    text = issue_text(package, "calc.py", "total", "Return the sum.\n\nMore.", failing, PYTEST_OUTPUT)
    assert text.startswith("# `calc.total` raises TypeError unexpectedly\n\nSeen with calc 1.0.\n\n")
    assert "> Return the sum.\n" in text and "More" not in text and "`test_sum`" in text
    assert "secret_line" not in text and "calc.py" not in text
    hidden = issue_text(package, "calc/_impl.py", "total", "Secret.", failing, UNITTEST_OUTPUT)
    assert hidden.startswith("# `calc` gives a wrong result") and "Secret" not in hidden and "_impl" not in hidden
