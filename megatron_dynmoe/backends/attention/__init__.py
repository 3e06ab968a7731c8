"""Attention of ``torch_native`` beyond one causal row: split over ranks, by document, latent."""
