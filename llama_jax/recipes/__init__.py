"""Stages of post-training wired into rounds."""
