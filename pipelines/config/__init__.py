"""Configuration: its schema, presets, and how a file and overrides become one."""
