"""docs/families.md says what the tests test, and the tests would notice a wrong excuse."""

from dataclasses import replace

import pytest

import tiny
from families.matrix import PROPERTIES, subject_of
from families.table import PAGE, page
from families.test_matrix import test_text_only as text_only
from tiny.parts import OLDEST


@pytest.mark.skipif(OLDEST, reason="the page says what newer versions of transformers can do")
def test_the_page_is_what_the_tests_make():
    assert PAGE.read_text() == page(), "run `make families-table`"


def test_what_cannot_be_is_named_as_the_properties_are():
    page()
    for case in tiny.CASES.values():
        assert case.cannot.keys() <= PROPERTIES.keys(), case.name


def test_an_excuse_that_the_stock_model_has_not_is_noticed():
    subject = subject_of(tiny.CASES["llava-siglip"], "inside")
    text_only(subject)
    subject.case = replace(subject.case, cannot={"text_only": "it is said"})
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        text_only(subject)
