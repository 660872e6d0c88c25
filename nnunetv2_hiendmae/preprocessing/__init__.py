"""Raw images become the arrays that pretraining reads; labels are not needed."""
