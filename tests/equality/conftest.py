"""Recording of what the equality tests measure; tests/conftest.py prints it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.equality.table import CHECKS, FAMILIES, PROPERTY


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str, str, str, float], None]:
    """``measured(case, check, side, off)``: a cell of the table, ``side`` is "own" or "registered".

    Call it before the assertion, so that a failure shows in the table. Cases of no family are left out.
    """

    def note(case: str, check: str, side: str, off: float) -> None:
        assert check in CHECKS and side in ("own", "registered")
        if case in FAMILIES:
            request.node.user_properties.append((PROPERTY, [FAMILIES[case], check, side, float(off)]))

    return note
