"""Scores of models, attacks on them, and the verdict."""
