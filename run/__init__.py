"""What train.py puts together: concepts from settings, in the order of a run."""
