"""From a trained MoE to one shared base and small deltas, in memory or from disk to disk (floor 2)."""

from ders.compression.compress import CompressionSummary, compress
from ders.compression.reading import read_source
from ders.compression.source import MoESource
from ders.compression.streaming import compress_folder

__all__ = ["CompressionSummary", "MoESource", "compress", "compress_folder", "read_source"]
