"""Images -> corrections: latent-level refinement (paper, section 4.2).

At every step the predicted picture is decoded and compared with two references by CLIP and DINO; the gradient of that score moves the
prediction (guide.py). Imports torch and the encoders' libraries, and nothing of any host.
"""
