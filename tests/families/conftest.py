"""Fixtures of the matrix."""

import pytest

from families.matrix import Subject, subject_of


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    return subject_of(*request.param)
