"""Recipes, tables, figures and the page that a report shows."""
