"""Tidy rows, one per number: what every figure, table and logger reads."""

from ssl_geometry.records.schema import COLUMNS, SCHEMA, Protocol, record
from ssl_geometry.records.store import RecordStore, read_records

__all__ = ["COLUMNS", "SCHEMA", "Protocol", "RecordStore", "read_records", "record"]
