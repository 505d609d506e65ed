"""Trained parameters in and out: run folders, Hugging Face, Meta's .pth, timm."""
