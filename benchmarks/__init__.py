"""Measurements behind the figures in docs/. Run from a checkout; not part of the wheel."""
