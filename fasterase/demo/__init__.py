"""The demo: real image-text pairs (emoji drawings, their names) and a small CLIP that knows them.

Emoji prove the machinery, not photographs: the pairs are few, clean and drawn.
"""
