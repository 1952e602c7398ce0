"""One table of entries for each family of methods; the suite collects them all."""
