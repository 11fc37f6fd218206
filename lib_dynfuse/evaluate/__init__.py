"""Methods of fusion compared on one's own model: pictures, scores, votes, a report.

plan -> folder -> makers (pictures) -> metrics (scores) -> statistics -> report; a study's and a judge's votes lie in the same folder.
"""
