"""What sweep.py tries, keeps and shows."""
