"""Mirrors the tree. world.py is the tiny world whose right answers are known by construction."""
