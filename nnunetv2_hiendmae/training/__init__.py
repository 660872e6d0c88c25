"""What pretraining and classification share: volumes in parts, run folders, devices. Knows no method and no network."""
