"""Measurements of time and memory, run by `svf benchmark`."""
