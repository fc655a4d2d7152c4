"""Recipes: one YAML each, only what differs from the defaults."""
