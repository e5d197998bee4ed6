"""The object store: one port, a folder or any S3-compatible store behind it, and a probe that refuses unfit ones."""
