"""A run's report, in stages: what is read (`history.py`), what of it is shown, the page, and pictures as files."""
