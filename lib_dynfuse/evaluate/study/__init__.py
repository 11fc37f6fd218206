"""`dynfuse study`: people choose between pictures without knowing which method made them.

draws (what is asked) -> page (shown by server, or a file) -> sheets (who answered what) -> ..preferences (what it says)
"""
