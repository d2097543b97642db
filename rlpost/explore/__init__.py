"""Explorers, one a file: each decides which rollouts a group still needs (`explorers.py`)."""
