"""Data sets, their loader, collators and metrics (floor 3; knows nothing of models)."""

from ders.data.digits import DigitsVQA
from ders.data.easy import EasyVQA
from ders.data.source import DataSource, LlavaFiles, PreparedData

__all__ = ["DataSource", "DigitsVQA", "EasyVQA", "LlavaFiles", "PreparedData"]
