"""`fmrun probe-layers`."""
