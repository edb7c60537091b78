"""Synthetic cohorts: phantom images that stand in for patients in tests, demonstrations and benchmarks."""
