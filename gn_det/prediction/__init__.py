"""Run a trained model on images, tiles of large images, videos and cameras, and write what it finds."""
