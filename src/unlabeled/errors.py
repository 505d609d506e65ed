"""The one error a user is meant to read."""


class UserError(Exception):
    """A mistake in what the user gave: one line saying what was wrong, where, and what would be right."""
