import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.sites import Site


def test_people_count_layers_from_one_and_heads_from_zero():
    assert str(Site(9, 8)) == "L10 H8"
    assert str(Site(29, mlp=True)) == "L30 MLP"
    assert str(Site(0)) == "L1"
    assert Site.parse("L10H8") == Site.parse(" L10 H8 ") == Site(9, 8)


@given(st.integers(0, 200), st.one_of(st.none(), st.integers(0, 200)), st.booleans())
def test_text_form_is_reversible(layer, head, mlp):
    site = Site(layer, head, mlp and head is None)
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize("text", ["L0 H1", "10.8", "H8", "L10 H8 MLP", ""])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="layers count from 1"):
        Site.parse(text)


def test_no_head_and_mlp_at_once():
    with pytest.raises(ValueError, match="not a place"):
        Site(1, 2, mlp=True)
