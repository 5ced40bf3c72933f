"""Output for people: tables, plots, picture sheets and the examples on them (page.py: the page)."""
