"""The demo's pictures: real ones that come with Python packages, so that no network is needed."""
