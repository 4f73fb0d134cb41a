"""Public data sets, one module each: `fetch(data_dir)` brings the files, `load(data_dir)` reads them.

Nothing is cleaned here (clean.py) or split (split.py). What is fetched is checked by its sha256 and never
becomes part of the repository.
"""
