"""Our files around other people's models: plain torch, and no model.py."""
