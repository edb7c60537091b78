"""Speed side by side with a bare PyTorch loop. Run with `make bench`; figures go to benchmarks/RESULTS.md by hand."""
