"""Filters of synthesis, one a file: a function of a row that returns why it goes or None, or a class with `stream`."""
