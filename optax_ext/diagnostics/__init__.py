"""Diagnostics: what an optimizer does, seen from inside."""

from optax_ext.diagnostics.record import RecordState, record, recorded

__all__ = ["RecordState", "record", "recorded"]
