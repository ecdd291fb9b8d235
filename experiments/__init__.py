"""One claim a file: its source, its protocol, and a verdict computed from the figures."""
