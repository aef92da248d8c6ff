"""Engines run job folders; what a job is stands in `jobs`."""
