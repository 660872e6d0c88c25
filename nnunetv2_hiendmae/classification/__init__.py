"""Disease classification with a pretrained encoder, on volumes that nnU-Net preprocessed."""
