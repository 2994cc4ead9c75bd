"""Counting parameters and bytes of real models (floor 2)."""

from ders.accounting.counts import Counts, count_parameters

__all__ = ["Counts", "count_parameters"]
