"""A run on the disk: saved, verified, and loaded on any layout."""
