"""One way to spread a run over processes in each file."""
