"""Scan and purify a model that somebody was handed: `bbmcl scan`, `bbmcl purify`, and the same as functions."""
