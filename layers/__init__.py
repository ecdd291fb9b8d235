"""What a model computes beside plain matrix products: attention, n-grams, generation."""
