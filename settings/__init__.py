"""Every setting of a run: what there is, what fits together, how it is read. Needs no torch."""
