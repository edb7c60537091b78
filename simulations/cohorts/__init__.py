"""Synthetic cohorts: phantom images that stand in for patients in tests, demonstrations and benchmarks."""

# The kinds there are, and the module whose ``make(directory, sites, patients, seed)`` writes one.
COHORTS = {
    "chest": "simulations.cohorts.chest",
    "ct": "simulations.cohorts.ct",
    "perfusion": "simulations.cohorts.perfusion",
    "two-views": "simulations.cohorts.twoviews",
}
