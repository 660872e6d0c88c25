"""Pictures of encoders and of what pretraining runs make of images."""
