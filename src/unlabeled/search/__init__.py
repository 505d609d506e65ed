"""The image index: build, add, delete, query."""
