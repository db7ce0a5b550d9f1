"""Features of a backbone: extraction, task signatures, Gaussians, centroids."""
