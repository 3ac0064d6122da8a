"""Configuration: frozen dataclasses, named recipes, and the command line that overrides them."""
