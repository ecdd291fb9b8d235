"""The dtypes a run computes with."""
