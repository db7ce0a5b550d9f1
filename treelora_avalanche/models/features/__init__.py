"""Features, the inputs of a classifier, and their statistics.

``extraction`` computes the features of a data set, ``signature`` the activation signature of a task
before its first step. ``gaussians`` and ``centroids`` are two kinds of class statistics, from which
pseudo-features are drawn, so that a head can be trained on past classes without storing samples.
``regularised`` is a head in closed form on the Gaussians, ``discriminant`` one on features.
"""
