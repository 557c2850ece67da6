"""The pipeline: from request to finished output."""
