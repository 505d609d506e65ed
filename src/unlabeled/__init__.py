"""DINOv2, complete."""
