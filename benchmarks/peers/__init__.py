"""Other frameworks on the same workloads, where they are installed; none is a dependency."""
