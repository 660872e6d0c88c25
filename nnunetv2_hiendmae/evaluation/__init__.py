"""Folds, result folders, and their comparison."""
