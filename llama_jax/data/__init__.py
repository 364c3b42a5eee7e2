"""Text to tokenised shards, shards to packed batches, and batches to devices."""
