"""Measurements that `svf benchmark` repeats."""
