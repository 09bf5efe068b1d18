"""Benchmarks: ``python bench/sweep.py`` times reciprocal against plain attention."""
