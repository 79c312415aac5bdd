"""The pages to look at: of a run (`run_page`) and of a sweep (`sweep_page`).

A page is one HTML file that loads nothing: styles, script, charts and thumbnails are inside. Each
has a module for its numbers, one for its charts, and one that fills the template.
"""
