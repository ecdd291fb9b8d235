"""Every setting of a run: what there is, what fits together, how it is read and written. Needs no torch."""
