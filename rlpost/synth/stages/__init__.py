"""Stages of synthesis, one a file: functions `name(rows, bench, ...)` that yield a row for each they are given."""
