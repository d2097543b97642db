"""Generators: interchangeable implementations of one protocol (`base.py`)."""
