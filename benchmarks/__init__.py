"""One benchmark a file; `python bench.py --help` names them."""
