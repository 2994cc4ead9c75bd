"""Data sets, their loader, collators and metrics (floor 3; knows nothing of models)."""

from ders.data.digits import DigitsVQA
from ders.data.easy import EasyVQA
from ders.data.files import LlavaFiles, LlavaMix
from ders.data.instructions import InstructionFiles
from ders.data.prepared import PreparedData
from ders.data.python_functions import PythonFunctions
from ders.data.source import DataSource, by_scale

__all__ = [
    "DataSource",
    "DigitsVQA",
    "EasyVQA",
    "InstructionFiles",
    "LlavaFiles",
    "LlavaMix",
    "PreparedData",
    "PythonFunctions",
    "by_scale",
]
