"""What benchmark, tune and ROAR+ share: pairs, map stores, intervals, compared methods, provenance."""
