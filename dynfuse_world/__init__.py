"""A miniature world."""
