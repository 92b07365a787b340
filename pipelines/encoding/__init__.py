"""Encoding: rows as tokens or pixels, and the batches of a step."""
