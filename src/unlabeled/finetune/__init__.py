"""Labelled images put to work: heads on frozen features, low-rank adapters, whole backbones; and what they predict."""
