"""Everything that is not arithmetic: HTTP, scheduling, metrics. Imports no torch."""

__version__ = "0.1.0"
