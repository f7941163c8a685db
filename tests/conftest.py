"""What every test may ask for: an object store of its own (`gcs_bucket`)."""

pytest_plugins = ["tests.gcs"]
