"""Settings found for a pair: small pictures at a few tilts and contrasts, scored by the guidance's encoders against the two references.

plan.py says what is tried, score.py how good a picture is, search.py finds the best, kept.py keeps what was found, sheet.py draws it.
"""
