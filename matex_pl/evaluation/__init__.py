"""Shared code of benchmark, tune and ROAR+: pairs, map stores, intervals, compared methods, provenance."""
