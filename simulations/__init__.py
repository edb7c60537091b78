"""One machine that plays many hospitals."""
