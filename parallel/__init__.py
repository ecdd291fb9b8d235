"""Ways to spread a run over processes, and what they share."""
