"""Pictures of nothing: readable, all different, the same ones every time."""

from __future__ import annotations

from encoders.images import read_picture
from encoders.strangers import DRAWN, strangers


def test_they_are_pictures_that_do_not_change() -> None:
    count = 2 * len(DRAWN)  # every kind, grey and coloured
    made = strangers(count)
    assert made == strangers(count)
    assert len({read_picture(png).digest for png in made}) == count
