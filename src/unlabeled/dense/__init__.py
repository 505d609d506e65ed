"""Segmentation, depth and masks from patch features."""
