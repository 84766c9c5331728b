"""Drawing synthetic images in bulk."""
