"""Pure functions on tensors: no Lightning, no files, no state.

Shape letters: B batch, N images, K neighbours, L layers, D features, C classes, V views, R ranks.
"""
