"""The caption sets of a corpus side by side."""
