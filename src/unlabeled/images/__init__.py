"""Bytes on disk to pixels: sources, decoding, order, evaluation transform, the report of bad files."""
