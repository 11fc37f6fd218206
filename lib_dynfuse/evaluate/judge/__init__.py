"""`dynfuse judge`: a model that sees pictures chooses between them, at any endpoint that speaks OpenAI's protocol.

protocol (what is asked, what an answer says) -> endpoint (asking) -> verdicts (what is kept) -> ..preferences (what it says)
"""
