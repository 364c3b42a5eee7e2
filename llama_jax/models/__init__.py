"""The network and its accounting."""
