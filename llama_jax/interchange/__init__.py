"""Other projects' checkpoint files, both ways, and our own: opened lazily, checked, loaded."""
