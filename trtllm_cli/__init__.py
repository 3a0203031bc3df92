"""Checkpoint in, verified engine out: download, convert, quantize, build, run and evaluate in separate stages."""

__version__ = "0.1.0"
