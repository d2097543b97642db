"""Stages of synthesis, one a file: a function `name(rows, bench, **parameters)` that yields a row for each it is given."""
