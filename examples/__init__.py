"""Example programs of keras-distilled-embedding."""
