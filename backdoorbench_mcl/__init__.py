"""Measure whether a backdoor defense works: attack x defense matrices with ASR and BA, judged by the harness."""

__version__ = "0.1.0"
