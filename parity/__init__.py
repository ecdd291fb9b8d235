"""The parity oracle: which tensor of two training runs differs first, and why. A tool."""
