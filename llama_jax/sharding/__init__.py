"""The device mesh and the table that lays logical dims on its axes."""
