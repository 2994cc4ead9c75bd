"""Records of runs, and the tables and figures built from them (floor 5)."""

from ders.reporting.record import RecordError, finish_record, read_record, start_record, write_record

__all__ = ["RecordError", "finish_record", "read_record", "start_record", "write_record"]
