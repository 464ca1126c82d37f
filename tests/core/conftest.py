import pytest


@pytest.fixture(autouse=True)
def in_float64(float64: None) -> None:
    """The oracles' digits are those of double precision."""
