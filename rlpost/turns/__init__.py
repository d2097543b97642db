"""Rollout functions that ship with rlpost, one a file; README.md shows how to write your own."""
