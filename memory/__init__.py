"""Where the bytes of a run go, and how there can be fewer."""
