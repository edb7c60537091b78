"""A trained model as files that other programs run: what `consilium export` writes. See docs/export.md."""
