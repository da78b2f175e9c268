"""Kernels of Steadystate: one file, one operation. Imports nothing and re-exports nothing."""

__version__ = "0.1.0"
