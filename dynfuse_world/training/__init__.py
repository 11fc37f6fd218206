"""Makes every weight of the miniature world from nothing: `python -m lib_dynfuse toy train`."""
