"""Looking at results."""
