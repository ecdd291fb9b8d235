"""Which numbers a run computes with."""
