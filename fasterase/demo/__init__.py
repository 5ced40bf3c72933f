"""The demo: real image-text pairs (emoji drawings and names) and a small CLIP trained on them.

Emoji test the machinery. They are few, clean and drawn, so they say nothing about photographs.
"""
