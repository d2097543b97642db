"""Synthesis of difficult problems: the stages of `rlpost synth`."""
